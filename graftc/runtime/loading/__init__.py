"""Loading compiled models from artifacts and checkpoints, and verifying them. Files are read, and none is written."""
