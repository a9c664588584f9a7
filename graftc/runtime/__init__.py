"""What happens after compiling: running, training, merging, exporting, files, and the command line.

`compiled` has the class that users hold, a facade whose methods call the folders below it."""
