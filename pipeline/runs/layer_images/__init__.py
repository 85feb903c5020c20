"""Images of layers that follow from the dataset: cells of activation atlases and facets of units."""
