"""What people look at: the page of a rewritten model, and pictures of its graph. `assets` has what runs in browsers."""
