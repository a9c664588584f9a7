"""Programs about serving: whether an engine computes what an adapter or a model means, and what graftc computes."""
