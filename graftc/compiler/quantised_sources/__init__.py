"""Convert models that arrive quantised into plain modules with packed weights."""
