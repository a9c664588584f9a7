"""Commands that train: whole recipes, from files to an artifact."""
