"""Coded errors and warnings, and how values look in messages and in notebooks. The standard library only.

A new code goes into `catalogue`, from which ``docs/errors.md`` is made."""
