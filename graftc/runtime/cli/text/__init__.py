"""The commands that make text, ``graftc generate`` and ``graftc chat``, what they share, and how Ctrl-C stops them."""
