"""The Builder, the only code that changes a graph, split by subject (tensors, linear maps, attention ...)

Methods call it; compositions override only its seams.
"""
