"""The commands that generate text, ``graftc generate`` and ``graftc chat``, with their shared parts and interrupts."""
