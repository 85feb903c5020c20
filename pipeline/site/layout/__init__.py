"""Layout: the map of units and the diagram of the network."""
