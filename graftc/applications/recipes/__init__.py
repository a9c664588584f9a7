"""Run methods that take several training runs as one resumable recipe: `tune`, and the folder of a recipe."""
