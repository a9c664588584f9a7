"""Tools for the development of graftc; not part of the package."""
