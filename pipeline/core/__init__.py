"""Basics that every package may use: errors, registries, seeds, files named in a configuration. No PyTorch, no HDF5."""
