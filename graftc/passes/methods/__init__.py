"""The code of the methods: one file for each, named as its spec's; presets have none.

A method changes a graph through the Builder only."""
