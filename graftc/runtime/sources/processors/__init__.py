"""Processors of folders: third-party code and sizes, which run in a separate process.

`example` starts it and checks what comes back; `worker` is that process and imports nothing of graftc.
"""
