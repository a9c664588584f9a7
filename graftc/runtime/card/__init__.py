"""Model cards: descriptions of an artifact or a compiled model, for people and for the Hugging Face hub.

The package reads artifacts and models, and does not change them.
"""
