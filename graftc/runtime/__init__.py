"""What happens after compiling."""
