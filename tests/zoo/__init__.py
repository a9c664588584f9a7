"""Small random models of many kinds, each with two batches of different structure."""
