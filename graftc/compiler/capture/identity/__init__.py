"""What tells one model, and the code that it runs, from another."""
