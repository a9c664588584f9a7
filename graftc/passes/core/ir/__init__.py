"""Programs: what a graph is, and how it is checked, printed, hashed and written to files.

Nothing here changes what a Program computes, but for deriving eval mode."""
