"""Programs: what a graph is, and how it is checked, printed and hashed; `stored` writes them to files.

Nothing here changes what a Program computes, but for deriving eval mode."""
