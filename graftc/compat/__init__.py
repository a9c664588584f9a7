"""Wrappers for private names of torch, transformers, TRL and peft, which are used nowhere else.

Each is a small function, or a re-exported class or value, in a file for its subject. `tests/compat` has a probe for
each private name, which fails when a release of a library changes the behaviour that graftc relies on. Public names and
behaviour that differ between the releases that graftc supports are here as well: `caches`, `autocast`. These modules
import nothing from graftc; optional packages are imported inside functions.
"""
