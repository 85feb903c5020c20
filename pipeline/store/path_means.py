"""Spatial means of visualizations at the depths before their layer, as shards and atlases store them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from pipeline.store import hdf5
from pipeline.store.shards import Shard

# Attribute of a shard and of a group `render/<preset>`: names of the layers whose spatial means `path_means` has, one
# after the other. The last is the layer of the units.
PATH_LAYERS = "path_layers"


def path_layers(attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the attribute `PATH_LAYERS`; empty for results of former versions."""
    return tuple(map(str, np.asarray(attributes.get(PATH_LAYERS, ())).tolist()))


def stored_path(shards: Sequence[Shard]) -> tuple[tuple[str, ...], int]:
    """Return the path layers of the first shard that has any, and the number of their channels; ((), 0) if none has."""
    for shard in shards:
        names = path_layers(shard.attributes)
        if names:
            with shard.opened() as opened:
                return names, hdf5.dataset(opened, "path_means").shape[-1]
    return (), 0


def depth_means(
    group: h5py.Group,
    widths: Mapping[str, int],
    excluded: Collection[str] = (),
    rows: np.ndarray | slice = slice(None),
) -> tuple[str, np.ndarray]:
    """Return the last depth before the layer of a group `render/<preset>`, and the spatial means of its channels.

    Args:
        group: The group.
        widths: Number of channels of each depth, by name.
        excluded: Names of depths that are passed over: those that the preset optimizes.
        rows: Rows of the units.

    Returns:
        The name and (G, V, D) float32; "" and (G, V, 0) if there is no such depth.
    """
    names = path_layers(hdf5.all_attributes(group))[:-1]
    if "path_means" not in group or any(name not in widths for name in names):
        names = ()
    for number in reversed(range(len(names))):
        if names[number] not in excluded:
            start = sum(widths[name] for name in names[:number])
            means = hdf5.dataset(group, "path_means")[rows, :, start : start + widths[names[number]]]
            return names[number], np.asarray(means, np.float32)
    return "", np.zeros((*hdf5.dataset(group, "activation")[rows].shape, 0), np.float32)
