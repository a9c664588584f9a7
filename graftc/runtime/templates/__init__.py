"""Chat templates of folders: programs of whoever made them, tried in a process of their own before they run here.

Imports nothing of graftc but `specs`.
"""
