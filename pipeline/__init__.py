"""Neuron Atlas: an atlas of every channel of every layer of a vision network."""

from pipeline.store.reader import Atlas as Atlas
from pipeline.store.reader import open_atlas as open_atlas

__version__ = "0.1.0"
