"""What graftc states about serving: what an engine does with a folder, and how a serving run compares with graftc's."""
