"""What training takes, worked out before it starts."""
