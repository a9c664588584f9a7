"""Execution of live models, in which the source's own Python calls graphs."""
