"""The implementations of the methods: one file for each, named after the file of its spec; presets have none.

A method changes a graph only through the Builder.
"""
