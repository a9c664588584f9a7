"""Execution of live models: the source's own Python, which calls graphs."""
