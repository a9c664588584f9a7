"""Implementations of the methods: one file per method, named after its spec's file; presets have none.

A method changes a graph only through the Builder.
"""
