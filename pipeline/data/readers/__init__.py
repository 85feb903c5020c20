"""One module per kind of source. Each has a function `list_images(config)` that returns a `Listing`."""
