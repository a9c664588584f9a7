"""The whole path on a real pretrained model and real data (`graftc demo`)."""
