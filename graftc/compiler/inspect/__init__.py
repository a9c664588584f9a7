"""A Compilation as data and text: reports, explanations, diffs, trees. Changes nothing."""
