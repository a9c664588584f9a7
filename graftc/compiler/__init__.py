"""From a spec and a model to verified Programs and their evidence; a folder for each stage.

A Compilation is data, and `pipeline` and `adapting` run the stages. The source model is read and never changed."""
