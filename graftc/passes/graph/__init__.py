"""Passes that know no method: they clean graphs up, cut, lengthen and outline them, and compose adaptations.

Each takes a Program and is verified behind it."""
