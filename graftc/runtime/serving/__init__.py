"""Serving engines: run a model with its adapters in one, in a process of its own.

`running` starts the scripts in `drivers` and reads their answers.
"""
