"""Statements about serving: how an engine treats a folder, and how a serving run compares with graftc's."""
