"""From the targets of a spec to the sites of a graph, and what a spec asks for beside targets: compositions, new
tokens, untied weights, token embeddings."""
