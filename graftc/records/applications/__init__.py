"""Records of the applications: what the demo, PET, the planner and the chat state about their runs."""
