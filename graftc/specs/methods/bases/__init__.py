"""Bases that several specs of methods share; none of them is a method."""
