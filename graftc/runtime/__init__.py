"""Everything after compiling: running, training, merging, exporting, files, and the command line.

`compiled` has the class that users work with; `offered` lists which object implements which of its methods.
"""
