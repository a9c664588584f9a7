"""The choice of the activations that a training step keeps for its backward pass, and of those that it recomputes."""
