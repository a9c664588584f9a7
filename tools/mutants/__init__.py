"""Mutation testing, changing code that tests cover to see whether they fail: ``python -m tools.mutants``.

Neither library fits: mutmut puts all variants of a function behind a trampoline, which graphs traced from source would
see, and cosmic-ray changes the working tree, runs one command for all files and knows no covered lines; neither draws a
seeded sample, exchanges arguments and drops statements, or stops when a mutant has used up its time.
"""
