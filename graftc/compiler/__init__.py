"""From a spec and a model to rewritten Programs and their evidence."""
