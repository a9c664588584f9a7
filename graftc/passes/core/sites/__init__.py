"""Sites: the places in a Program that a method can adapt, and how calls use stored weights there.

Sites are found and read here; only `build` changes a graph.
"""
