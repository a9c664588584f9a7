"""Choose which activations a training step keeps for its backward pass and which it recomputes."""
