"""Dictionaries fitted to the activations of a layer: sparse autoencoders, decompositions, concepts."""
