"""Models that arrive quantised: their modules as plain ones with packed weights."""
