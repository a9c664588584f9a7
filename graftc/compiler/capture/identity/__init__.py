"""Identification of models and of the code that they run."""
