"""Hooks of users on layers and on the table of embeddings of a compiled model: they get, and may change, what they do
in the source model. Nothing here knows of Runners; `runtime/model` calls it."""
