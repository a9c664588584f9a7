"""Load compiled models from artifacts and checkpoints, and verify them. Files are only read, never written."""
