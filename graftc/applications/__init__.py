"""Programs on top of compiled models: PET, the planner, recipes of several trainings, chat, and the demo.

Each uses the package as a user would; nothing below imports them.
"""
