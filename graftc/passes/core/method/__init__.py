"""The interface of methods: their base class, what they may do beside the graph, and how they are found by tag.

The methods themselves are in `graftc.passes.methods`.
"""
