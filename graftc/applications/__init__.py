"""Programs built on compiled models: PET, the planner, recipes with several training runs, chat, and the demo.

Each uses the package as a user would; no lower layer imports them.
"""
