"""Thin, typed wrappers of the Linux calls that Python's standard library lacks.  One concept per module; no policy."""
