"""Commands that make files to publish with an artifact. They read the artifact, and write next to it."""
