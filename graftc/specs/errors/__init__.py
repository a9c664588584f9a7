"""Coded errors and warnings, and the formatting of values in messages and notebooks. Uses only the standard library.

New codes go into `catalogue`, from which ``docs/errors.md`` is generated.
"""
