"""Reading and writing of peft's checkpoints by the tables that methods have beside their specs (`graftc.specs.peft`).

Neither peft nor anything that a file names is imported for this. `folder` reads the files, and `importing` compiles
what they contain.
"""
