"""The ``graftc::`` operators: kernels, gradients and decompositions into ATen.

Operators take tensors and numbers only: no graph, no site, no method.
"""
