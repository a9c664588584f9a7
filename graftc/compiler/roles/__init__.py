"""What the parts of a graph do, read off its data flow. Knows no spec and no names."""
