"""Slow definitions of the methods, one module per method, for tests and for readers.

They share only result types with the fast code, so that they cannot share a mistake.
"""
