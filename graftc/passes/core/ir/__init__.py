"""Programs: their graphs, with verification, printing and hashing; `stored` reads and writes them as files.

Only the derivation of eval mode changes what a Program computes.
"""
