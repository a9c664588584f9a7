"""The compiler turns a spec and a model into verified Programs and their evidence; each stage has a folder.

A Compilation is data; `pipeline` and `adapting` run the stages. The source model is read but never changed.
"""
