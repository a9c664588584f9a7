"""Models and files of other libraries.

Files are read as data and never trusted.
"""
