"""What tests in several folders share: models and specs, errors, comparisons, and processes of their own."""
