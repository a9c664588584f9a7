"""From artifacts and checkpoints back to compiled models, and whether these are what the files say. Reads files, writes
none."""
