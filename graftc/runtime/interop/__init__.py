"""Models and files from other libraries.

Files are read as data and never trusted.
"""
