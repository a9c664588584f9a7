"""Code that several methods share, and controllers too long for a method's own file; no methods live here."""
