"""The building blocks of passes: Programs, weights, sites, the Builder, the base class of methods, operators.

They are independent of any particular method. Imports go in one direction: ``ops``, ``weights`` < ``ir`` < ``sites`` <
``build`` < ``method``.
"""
