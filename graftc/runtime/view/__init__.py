"""Views of a rewritten model: a page, and pictures of its graph. `assets` contains the code that runs in browsers."""
