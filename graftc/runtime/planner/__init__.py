"""What training takes, worked out before it starts: steps are run on tensors without memory, and nothing is guessed."""
