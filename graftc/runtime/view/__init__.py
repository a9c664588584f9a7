"""Views of a rewritten model: its page, and pictures of its graph. `assets` contains the code for browsers."""
