"""Path similarity of the visualizations in an atlas: joins stored spatial means with those of dataset images."""

import dataclasses

import h5py
import numpy as np
import torch
from torch import Tensor

from pipeline.examples.results import DatasetPassResult
from pipeline.images.path_similarity import NaturalPaths, PathSimilarity, path_similarity
from pipeline.layers.finding import Layer
from pipeline.layers.path_depths import depths_before
from pipeline.store import hdf5
from pipeline.store.path_means import path_layers


@dataclasses.dataclass(frozen=True)
class PathUnits:
    """Units of a layer whose visualizations are compared.

    Attributes:
        layer: The layer.
        number: Its number in the dataset pass.
        channels: Channels of the units, (G,) int64.
        examples: List of the dataset examples that they are compared with.
        rows: Those of them that are compared.
    """

    layer: Layer
    number: int
    channels: Tensor
    examples: str
    rows: np.ndarray | slice


def path_relations(target: h5py.Group, units: PathUnits, pass_result: DatasetPassResult) -> dict[str, np.ndarray]:
    """Return the path similarity of visualizations in a group `render/<preset>` by name, of the units `units.rows`.

    Empty if the stored `path_means` are not of the depths of the dataset pass.
    """
    depths = depths_before(units.layer, pass_result.paths.depths)
    expected = (*(depth.name for depth in depths), units.layer.name)
    if "path_means" not in target or path_layers(hdf5.all_attributes(target)) != expected:
        return {}
    means = torch.from_numpy(hdf5.dataset(target, "path_means")[units.rows].astype(np.float32))
    widths = [depth.channels for depth in depths]
    own_means = means[..., sum(widths) :]
    parts = means[..., : sum(widths)].split(widths, -1) if widths else ()
    found = [
        path_similarity(part, _natural(pass_result, units, "path/index", f"path/{i}")) for i, part in enumerate(parts)
    ]
    own = _natural(pass_result, units, f"{units.number}/paths", f"{units.number}/mean")
    found.append(path_similarity(own_means, own, units.channels[units.rows]))
    similarity = PathSimilarity.stacked(found)
    averages = similarity.averages()
    arrays = {
        "path_ratio": averages.ratio,
        "path_similarity": averages.value,
        "path_natural": averages.natural,
        "path_random": averages.random,
        "path_curve": similarity.value,
        "path_curve_natural": similarity.natural,
        "path_curve_random": similarity.random,
    }
    return {name: values.numpy().astype(np.float32) for name, values in arrays.items()}


def _natural(pass_result: DatasetPassResult, units: PathUnits, index_name: str, means_name: str) -> NaturalPaths:
    """Return the dataset images at one depth: the units' best examples and the random images."""
    index = pass_result.localizations[index_name]
    order = np.argsort(index, kind="stable")
    examples = pass_result.examples[units.number].path_examples(units.examples)[units.rows]
    example_rows, sample_rows = (_rows(images, index, order) for images in (examples, pass_result.paths.sample))
    sample_rows = sample_rows[sample_rows >= 0]  # some images cannot be read
    # Only the images of this layer, of all those of the pass.
    used = np.unique(np.concatenate([example_rows[example_rows >= 0], sample_rows]))
    return NaturalPaths(
        torch.from_numpy(pass_result.localizations[means_name][used].astype(np.float32)),
        torch.from_numpy(np.where(example_rows >= 0, np.searchsorted(used, example_rows), -1)),
        torch.from_numpy(np.searchsorted(used, sample_rows)),
        torch.from_numpy(pass_result.paths.sources[index[used]].astype(np.int64)),
    )


def _rows(images: np.ndarray, index: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return the positions of images in `index`, which is ascending in `order`; −1 for those that it lacks."""
    if not len(index):
        return np.full(images.shape, -1)
    rows = order[np.searchsorted(index, images, sorter=order).clip(max=len(index) - 1)]
    return np.where((images >= 0) & (index[rows] == images), rows, -1)
