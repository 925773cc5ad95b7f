"""What the library computes, written out slowly, a module a method: for tests and for reading.

Nothing but result types is shared with the fast path, so that a mistake has to be made twice to go unnoticed.
"""
