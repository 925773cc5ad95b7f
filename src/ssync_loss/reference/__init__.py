"""Slow definitions of the library, one module a method, for tests and for reading.

They share only result types with the fast path, so that one mistake cannot be in both.
"""
