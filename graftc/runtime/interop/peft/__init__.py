"""Read and write peft checkpoints according to the tables defined next to the methods' specs (`graftc.specs.peft`).

This package imports neither peft nor anything that a file names. `folder` reads the files, and `importing` compiles
their contents.
"""
