"""The tests, and the documented ways to begin, in environments of other versions, each made from empty."""
