"""Find layers that are alike, trace one of each kind, and write the others as calls of it."""
