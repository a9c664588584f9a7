"""What the anchor looks at: a source model and its graph, run on the same inputs."""
