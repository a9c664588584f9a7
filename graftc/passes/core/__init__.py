"""The building blocks of passes: Programs, weights, sites, the Builder, the base class of methods, operators.

Independent of any method. Imports go one way: ``ops``, ``weights`` < ``ir`` < ``sites`` < ``build`` < ``method``.
"""
