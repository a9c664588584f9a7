"""Model cards: what an artifact or a compiled model says to people and to the Hugging Face hub.

Reads, and changes nothing."""
