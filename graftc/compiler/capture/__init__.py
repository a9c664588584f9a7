"""From a model to its base graphs: capturing, the cache, the anchor, inputs and signatures. Knows no spec."""
