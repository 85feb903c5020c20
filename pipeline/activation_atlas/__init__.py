"""Activation atlases of layers: activations of dataset images, laid out in a plane, with one visualization per cell."""
