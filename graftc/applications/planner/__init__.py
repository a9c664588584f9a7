"""Compute the memory that training takes in advance, by running steps on tensors without memory, not by estimates."""
