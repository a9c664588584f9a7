"""From the targets of a spec to the sites of a graph, and what a spec asks for beside targets: compositions, new
tokens, untied weights, token embeddings. `selection` is what a target selects as a value, before there is a spec."""
