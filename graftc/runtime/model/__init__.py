"""Runners, which run Programs with the interface of the source model, and the modules that own them.

Runners read a Compilation and never change its graphs. All uses of a Runner other than calls are in other folders.
"""
