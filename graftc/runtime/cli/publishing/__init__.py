"""Commands that make what is published beside an artifact. They read the artifact, and write beside it."""
