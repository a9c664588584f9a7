"""Models and files of other libraries.

What they wrote is read as data and never trusted."""
