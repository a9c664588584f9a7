"""How the elements of a model that is taken apart are called: by the text of a flag, and with a cache of their own."""
