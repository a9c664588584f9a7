"""Run methods that need several training runs as one resumable recipe, with its own folder."""
