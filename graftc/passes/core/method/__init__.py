"""What a method is: its base class, what it may do beside the graph, and how it is found by its tag.

Methods themselves are in `graftc.passes.methods`."""
