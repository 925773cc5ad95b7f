"""Measurements of the losses; see README.md."""
