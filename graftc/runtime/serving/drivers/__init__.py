"""Scripts that run serving engines: `main` is started in a process of its own, and runs the file of one engine.

They import nothing from graftc, so they also run in an engine's own environment. A driver defines ``generate``, which
takes a request as plain data and returns the engine's version and the tokens of every prompt; `graftc.runtime.serving.
running` says what is in both.
"""
