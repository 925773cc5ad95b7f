"""The suites: what is measured, and where."""
