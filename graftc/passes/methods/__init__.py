"""Implementations of the methods: one file per method, named after its spec's file; presets have no file.

A method changes a graph only through the Builder.
"""
