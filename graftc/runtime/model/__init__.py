"""Runners, which run Programs with the interface of the source model, and the modules that own them.

They read a Compilation and never change its graphs. Everything else that is done with a Runner, besides calls, is in
other folders.
"""
