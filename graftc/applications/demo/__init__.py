"""The whole workflow on a real pretrained model and real data (`graftc demo`).

The package uses the public interface as a user would; only the command itself imports it.
"""
