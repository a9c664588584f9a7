"""PET: from patterns and rows of data to batches, members of an ensemble and a final classifier."""
