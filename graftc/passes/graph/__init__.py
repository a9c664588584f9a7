"""Passes that are independent of methods: they clean up, cut, lengthen and outline graphs, and compose adaptations.

Each takes a Program, which is verified afterwards.
"""
