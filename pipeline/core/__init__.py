"""What every package may use: errors, registries, seeds, configuration values that are files. No PyTorch, no HDF5."""
