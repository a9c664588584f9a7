"""Passes that are independent of methods: they clean up, cut, lengthen and outline graphs, and compose adaptations.

Each rewrites a Program, which is verified afterwards.
"""
