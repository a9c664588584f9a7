"""Tools for working on graftc; no part of the package."""
