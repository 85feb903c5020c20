"""The HDF5 files of a run: its shards, and the atlas that combines them.

The package exports the API for reading an atlas. `pipeline.store.writer` is not imported here, because it needs
PyTorch.
"""

from pipeline.store.layer_view import LayerView
from pipeline.store.reader import Atlas, open_atlas

__all__ = ["Atlas", "LayerView", "open_atlas"]
