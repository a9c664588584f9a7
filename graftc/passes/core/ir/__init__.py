"""Programs: their graphs, and how these are checked, printed and hashed; `stored` writes them to files.

Nothing here changes what a Program computes, except the derivation of eval mode.
"""
