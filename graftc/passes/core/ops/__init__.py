"""The ``graftc::`` operators: kernels, gradients and decompositions into ATen.

An operator knows tensors and numbers: no graph, no site, no method."""
