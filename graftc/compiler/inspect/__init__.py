"""Read-only views of a Compilation as data and text: reports, explanations, diffs and trees."""
