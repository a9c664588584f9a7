"""Compute in advance how much memory training takes, by running steps on tensors without memory, not by estimating."""
