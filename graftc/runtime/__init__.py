"""What happens after compiling: running, training, merging, exporting, files, and the command line.

`compiled` has the class that users hold; `offered` says which object does what of it."""
