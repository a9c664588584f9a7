"""Read and write peft checkpoints according to the tables defined next to methods' specs (`graftc.specs.peft`).

This imports neither peft nor anything that a file names. `folder` reads the files, and `importing` compiles their
contents.
"""
