"""The whole path on a real pretrained model and real data (`graftc demo`).

The package uses the public interface as a user would; only its command imports it.
"""
