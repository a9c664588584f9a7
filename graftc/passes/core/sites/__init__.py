"""Sites: the places in a Program that a method can adapt, and the way in which calls use stored weights there.

This folder only recognises and reads sites; only `build` changes a graph.
"""
