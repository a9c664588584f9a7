"""Views of a Compilation as data and text: reports, explanations, diffs and trees. They change nothing."""
