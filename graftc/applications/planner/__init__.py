"""The memory that training takes, computed in advance by running steps on tensors without memory, without guesses."""
