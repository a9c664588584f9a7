"""Run the processors in model folders, which are third-party code of unknown cost, in a separate process.

`example` starts the process and checks its results; `worker` is the script that it runs, which imports nothing from
graftc.
"""
