"""The version of graftc. Artifacts, caches and cards name it."""

__version__ = "0.1.0.dev0"
