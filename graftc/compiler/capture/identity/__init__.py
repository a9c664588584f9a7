"""Identify models, and digest the code that they run, for the keys of stored captures."""
