"""Packed weights: how a weight is stored in fewer bits, and how its values are made of that."""
