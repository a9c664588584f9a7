"""Steps that rewrite a training graph right before it becomes code. The portable Program is not changed."""
