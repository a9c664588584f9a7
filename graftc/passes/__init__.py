"""How graphs are rewritten: the passes that know no method, and the methods.

A pass takes a Program and is verified behind it; nothing here knows a spec document or a source model.
"""
