"""Coordinates: the map of units, and the diagram of a network."""
