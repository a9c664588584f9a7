"""Serving engines: a table of what each one reads, and runs of a model with its adapters in one.

`engines` is the table; every statement about an engine stands there once. `limits` checks files against it before
anything is written. `running` starts the scripts in `drivers`, each in a process of its own, and reads their answers.
"""
