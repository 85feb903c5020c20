"""Neuron Atlas: an atlas of every channel of every layer of a vision network."""

from pipeline.atlas import Atlas as Atlas
from pipeline.atlas import open_atlas as open_atlas

__version__ = "0.1.0"
