"""What training does beside the graph: controllers, objectives, callbacks and choices by examples.

Values of the Store change here; graphs do not."""
