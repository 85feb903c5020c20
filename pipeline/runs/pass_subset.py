"""Subset of a finished dataset pass: some of its layers and channels become the dataset pass of a smaller run.

The arrays of a pass hold the channels of all layers side by side, and no channel depends on another. So columns of the
first pass and rows of the second pass are copied, and no image is read. The numbers equal those of a dataset pass of
the smaller run up to the rounding of a network that is folded for other layers.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from pipeline.core import atomic_io, hashing
from pipeline.examples.localize import SecondPassIndex
from pipeline.examples.shown_images import concatenate_bytes
from pipeline.examples.sweep import labelled_images
from pipeline.layers.path_depths import depths_before
from pipeline.planning import manifest
from pipeline.planning.cost_model import PlanRow
from pipeline.planning.folder import RunFolder
from pipeline.planning.plan import Plan
from pipeline.runs.dataset_pass import DatasetPass, devices_of
from pipeline.store import shards
from pipeline.store.shards import Shard

# Arrays of the first pass with one row per layer, and those with one row per image and one column per channel. All
# others have one row per channel, or concern the images alone.
PER_LAYER = ("tally/crowd", "tally/crowded")
PER_IMAGE = ("responses/peak", "codes/bin")


@dataclasses.dataclass(frozen=True)
class _LayerSelection:
    """What to copy of one layer's second pass.

    Attributes:
        source: Index of the layer in the source.
        keys: Keys of the (image, row) pairs to copy; see `_keys`.
        rows: Row in the copy for each row in the source, −1 if it is not copied; int32.
        top: Images whose maximum activations of the whole layer are copied.
        paths: Images whose spatial means of the whole layer are copied.
    """

    source: int
    keys: np.ndarray
    rows: np.ndarray
    top: np.ndarray
    paths: np.ndarray


class PassSubset:
    """The layers and channels of a plan in the dataset pass of another run.

    Attributes:
        source: The dataset pass of the other run.
        covers_channels: Whether the second pass of the source localizes all channels of the plan.
    """

    def __init__(self, plan: Plan, source: DatasetPass) -> None:
        self.source = source
        index = {layer.name: i for i, (layer, _) in enumerate(source.layers)}
        starts = np.cumsum([0, *(layer.channels for layer, _ in source.layers)])
        self._layers = [index[layer.name] for layer, _ in plan.layers]
        self._num_depths = max(len(depths_before(layer, plan.setup.depths)) for layer, _ in plan.layers)
        self._columns = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in self._layers])
        source_channels = [set(source.layers[i][1]) for i in self._layers]
        self.covers_channels = all(
            set(channels) <= available for (_, channels), available in zip(plan.layers, source_channels, strict=True)
        )

    @classmethod
    def of(cls, plan: Plan, folder: RunFolder, ignored: Collection[Path] = frozenset()) -> "PassSubset | None":
        """Return the subset of the dataset pass of the run in `folder`, without the damaged files `ignored`.

        Returns:
            None if the weights, the dataset or a layer of the plan differ, if the other run has so many channels that
            it stored the histogram bins of fewer images, or if it has no manifest.
        """
        source = manifest.read(folder.path)
        if source is None or (source.weights, source.dataset) != (plan.setup.weights, plan.dataset_fingerprint):
            return None
        taps = {layer.name: (layer.tap, layer.channels) for layer, _ in source.layers}
        if any(taps.get(layer.name) != (layer.tap, layer.channels) for layer, _ in plan.layers):
            return None
        totals = [sum(layer.channels for layer, _ in layers) for layers in (plan.layers, source.layers)]
        stored = {min(labelled_images(plan.config.examples, total), len(plan.setup.dataset.images)) for total in totals}
        if len(stored) > 1:
            return None
        main = plan.config.render.name
        rows = tuple(PlanRow(layer, channels, (0, 0), 0.0, main) for layer, channels in source.layers)
        setup = dataclasses.replace(plan.setup, layers=tuple(layer for layer, _ in source.layers))
        channels = {layer.name: channels for layer, channels in source.layers}
        source_plan = dataclasses.replace(plan, rows=rows, setup=setup, channels=channels)
        return cls(plan, DatasetPass(source_plan, folder.shards, True, ignored))

    def can_copy_first_pass(self, target: DatasetPass) -> bool:
        """Return whether the source has a complete first pass and `target` none with other histogram ranges."""
        return self.source.covered and target.content in ("", hashing.arrays_digest(self._ranges()))

    def _ranges(self) -> dict[str, np.ndarray]:
        """Return the histogram ranges of the plan's layers."""
        assert self.source.histogram_ranges is not None
        return {name: array[self._columns] for name, array in self.source.histogram_ranges.arrays().items()}

    def write_first_pass(self, target: DatasetPass) -> int:
        """Write histogram ranges and all shards of the first pass into the folder of `target`.

        Returns:
            The number of shards.
        """
        ranges = self._ranges()
        content = hashing.arrays_digest(ranges)
        path = target.path("ranges", "ranges", target.ranges_digest)
        assert self.source.histogram_ranges is not None
        device = _device_of(self.source.histogram_ranges)
        shards.write(path, {"digest": target.ranges_digest, "content": content, **device}, ranges)
        for (start, end), shard in self.source.swept_ranges.items():
            place = {"digest": target.digest, "start": start, "end": end}
            attributes = {**place, "ranges": content, **_device_of(shard)}
            data = shards.to_bytes(attributes, self._first_pass_arrays(shard.arrays()), "lzf")
            atomic_io.write_atomic(target.path("examples", f"{start}-{end}", target.digest), data)
        return 1 + len(self.source.swept_ranges)

    def _first_pass_arrays(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the arrays of a `PassResult` with the layers of the plan only."""
        subset = dict(arrays)
        for name, array in arrays.items():
            if name in PER_LAYER:
                subset[name] = array[self._layers]
            elif name in PER_IMAGE:
                subset[name] = array[:, self._columns]
            elif name.startswith(("tops/", "tally/")) and array.ndim:
                subset[name] = array[self._columns]
        return subset

    def write_second_pass(self, target: DatasetPass) -> int:
        """Write the second pass into the folder of `target`, whose first pass is complete.

        Returns:
            The number of shards: 0 if the source lacks an image that `target` needs, so that the second pass must be
            computed.
        """
        index, source_index = target.index, self.source.index
        selections = self._select(index, source_index)
        if selections is None:
            return 0
        count = 0
        for (first, last), shard in self.source.localized_ranges.items():
            start = int(np.searchsorted(index.images, source_index.images[first]))
            end = int(np.searchsorted(index.images, source_index.images[last - 1], "right"))
            if start == end:
                continue
            arrays = _second_pass_arrays(shard.arrays(), index, slice(start, end), selections)
            arrays |= _path_arrays(shard.arrays(), index, self._num_depths)
            attributes = {"digest": target.localize_digest, "start": start, "end": end, **_device_of(shard)}
            path = target.path("localize", f"{start}-{end}", target.localize_digest)
            atomic_io.write_atomic(path, shards.to_bytes(attributes, arrays, "lzf"))
            count += 1
        return count

    def _select(self, index: SecondPassIndex, source_index: SecondPassIndex) -> list[_LayerSelection] | None:
        """Return what to copy of each layer; None if the source lacks a pair or an image of `index`."""
        selections = []
        for i, source in enumerate(self._layers):
            channels = source_index.channels[source]
            source_row = np.searchsorted(channels, index.channels[i])
            pairs = index.pairs[i].astype(np.int64)
            keys = pairs[:, 0] * len(channels) + source_row[pairs[:, 1]]
            if not np.isin(keys, _keys(source_index.pairs[source], len(channels))).all():
                return None
            if not np.isin(index.top[i], source_index.top[source]).all():
                return None
            if not np.isin(index.paths[i], source_index.paths[source]).all():
                return None
            rows = np.full(len(channels), -1, np.int32)
            rows[source_row] = np.arange(len(source_row))
            selections.append(_LayerSelection(source, keys, rows, index.top[i], index.paths[i]))
        return selections


def _device_of(shard: Shard) -> dict[str, str]:
    """Return the attribute of a copy that names the device of the original; empty for a shard of a former version."""
    device = devices_of([shard])
    return {"device": device} if device else {}


def _second_pass_arrays(
    source: Mapping[str, np.ndarray], index: SecondPassIndex, part: slice, selections: list[_LayerSelection]
) -> dict[str, np.ndarray]:
    """Return the arrays of a shard of the second pass with the images `part` of the index and the selected pairs."""
    arrays = _image_arrays(source, np.intersect1d(index.images[part], index.shown))
    for i, selection in enumerate(selections):
        j = selection.source
        pairs = source[f"{j}/pairs"]
        selected = np.isin(_keys(pairs, len(selection.rows)), selection.keys)
        for name in ("place", "range", "map"):
            arrays[f"{i}/{name}"] = source[f"{j}/{name}"][selected]
        rows = selection.rows[pairs[selected, 1]]
        arrays[f"{i}/pairs"] = np.stack([pairs[selected, 0], rows, pairs[selected, 2]], 1)
        for wanted, names in ((selection.top, ("top", "answer")), (selection.paths, ("paths", "mean"))):
            images = np.isin(source[f"{j}/{names[0]}"], wanted)
            arrays |= {f"{i}/{name}": source[f"{j}/{name}"][images] for name in names}
        if f"{j}/jpeg" in source:
            arrays |= _select_jpegs(source, f"{j}/", f"{i}/", selected)
    return arrays


def _path_arrays(source: Mapping[str, np.ndarray], index: SecondPassIndex, num_depths: int) -> dict[str, np.ndarray]:
    """Return the spatial means of the images in `index` at the first depths of a shard of the second pass."""
    selected = np.isin(source["path/index"], np.concatenate(index.paths))
    return {f"path/{name}": source[f"path/{name}"][selected] for name in ("index", *range(num_depths))}


def _keys(pairs: np.ndarray, num_rows: int) -> np.ndarray:
    """Return one int64 key (P,) for each (image, row, …) of `pairs` (P, 3), where rows are below `num_rows`."""
    return pairs[:, 0].astype(np.int64) * num_rows + pairs[:, 1]


def _image_arrays(source: Mapping[str, np.ndarray], images: np.ndarray) -> dict[str, np.ndarray]:
    """Return the arrays of the stored dataset images that are in `images`."""
    selected = np.isin(source["shown/index"], images)
    arrays = {f"shown/{name}": source[f"shown/{name}"][selected] for name in ("index", "size", "box")}
    arrays["shown/lost"] = source["shown/lost"][np.isin(source["shown/lost"], images)]
    if "shown/jpeg" in source:
        arrays |= _select_jpegs(source, "shown/", "shown/", selected)
    return arrays


def _select_jpegs(
    source: Mapping[str, np.ndarray], source_prefix: str, prefix: str, selected: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the selected ones of concatenated JPEG files, under names that begin with `prefix`."""
    offset, data = source[f"{source_prefix}offset"], source[f"{source_prefix}jpeg"]
    return concatenate_bytes(
        prefix, [data[offset[i] : offset[i + 1]].tobytes() for i in np.flatnonzero(selected).tolist()]
    )
