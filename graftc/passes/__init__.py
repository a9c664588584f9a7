"""Graph rewriting: passes that are independent of methods, and the methods themselves.

A pass takes a Program and is verified behind it; nothing here knows a spec document or a source model.
"""
