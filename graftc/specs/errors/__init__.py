"""Coded errors and warnings, and the format of values in messages and in notebooks. The standard library only.

A new code is added to `catalogue`, from which ``docs/errors.md`` is generated.
"""
