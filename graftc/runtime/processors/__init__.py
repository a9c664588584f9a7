"""Processors of folders: code and sizes of whoever made them, which run in a process of their own.

`example` starts it and checks what comes back; `worker` is that process and imports nothing of graftc.
"""
