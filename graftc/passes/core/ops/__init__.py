"""The ``graftc::`` operators: kernels, gradients and decompositions into ATen.

Operators take only tensors and plain values: no graphs, sites or methods.
"""
