"""Modules that run Programs with the interface of the source model.

They read a Compilation and never change its graphs."""
