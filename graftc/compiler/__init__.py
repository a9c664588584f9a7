"""The compiler: from a spec and a model to verified Programs and their evidence, with a folder for each stage.

A Compilation is data, and `pipeline` and `adapting` run the stages. The source model is read and never changed.
"""
