"""HDF5 files: the shards of a run, and `atlas.h5`."""
