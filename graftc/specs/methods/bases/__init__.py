"""Base classes that several method specs share; none of them is a method."""
