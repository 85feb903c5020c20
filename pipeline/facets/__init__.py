"""Facets of units: groups of a unit's dataset examples by other responses of the network, with one image for each."""
