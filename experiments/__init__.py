"""Experiments whose figures are stored cell by cell, and the page of results that shows them."""
