"""A graftc method: scale the outputs of linear layers by a trained vector."""
