"""The interface of methods: their base class, their optional capabilities, and their lookup by tag.

The methods themselves are in `graftc.passes.methods`.
"""
