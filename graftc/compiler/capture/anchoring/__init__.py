"""The runs that the anchor compares: a source model and its graph, on the same inputs."""
