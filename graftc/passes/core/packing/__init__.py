"""Packed weights: formats that store a weight in fewer bits, and the computation of its values."""
