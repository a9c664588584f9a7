"""Private names of torch, transformers, TRL and peft, under names of graftc's own: they are used nowhere else.

Each of them is a small function, or a class or value passed on, in a file for its subject. `tests/compat` has a probe
for each private name, which fails when a release of a library changes what graftc relies on. Imports nothing of graftc;
packages that need not be installed are imported inside functions.
"""
