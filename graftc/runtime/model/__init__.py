"""Runners, which run Programs with the interface of the source model, and the modules that have them.

They read a Compilation and never change its graphs. What is done with a Runner beside calls is in other folders."""
