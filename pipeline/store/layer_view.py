"""What an atlas says of one layer, as NumPy and pandas, read when asked for; `pipeline.store.reader` opens the file."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import zlib
from collections.abc import Collection, Sequence
from typing import Any

import h5py
import numpy as np
import pandas as pd
from PIL import Image

from pipeline.core import metric_specs
from pipeline.core.errors import AtlasError, nearest
from pipeline.data import crops
from pipeline.store import shards


@dataclasses.dataclass(frozen=True)
class ShownPhoto:
    """A photograph that an atlas shows: the size (width, height) of its source picture and the part that became the
    network's input, (left, top, right, bottom), which may reach beyond the edges; both in pixels of that picture.
    """

    index: int
    size: tuple[int, int]
    box: tuple[float, float, float, float]


def jpeg_image(group: h5py.Group, at: int) -> Image.Image:
    """Picture `at` of a group with JPEG bytes and offsets."""
    start, end = shards.dataset(group, "offset")[at : at + 2]
    return Image.open(io.BytesIO(shards.dataset(group, "jpeg")[int(start) : int(end)].tobytes()))


@dataclasses.dataclass(frozen=True)
class Examples:
    """Photographs that stand for each unit of a layer; (C', k) arrays, `index` −1 where there is none.

    `value` is the response, `index` the photograph's row in the dataset, `y` and `x` the place on the map, `map` the
    number of the heat-map (−1 for none).
    """

    value: np.ndarray
    index: np.ndarray
    y: np.ndarray
    x: np.ndarray
    map: np.ndarray


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Per-image maxima of each unit: `counts` (C', bins) between the `edges` (C', bins + 1).

    `under` and `over` (C',) count the images beyond the edges; `ends` (C', 2) are the least and largest maximum.
    """

    counts: np.ndarray
    edges: np.ndarray
    under: np.ndarray
    over: np.ndarray
    ends: np.ndarray


@dataclasses.dataclass(frozen=True)
class Wiring:
    """The units of `layer` that each unit of another is most strongly wired to; (C', k) arrays, strongest first.

    `channel` is −1 where there are fewer; `norm` and `sum` are those of the weights between the two.
    """

    layer: str
    channel: np.ndarray
    norm: np.ndarray
    sum: np.ndarray


@dataclasses.dataclass(frozen=True)
class Labels:
    """Labels of each unit, by number in `Atlas.dataset_labels`; −1 and NaN where there is nothing to say.

    `over` (C', 3) are the most over-represented in the top 1 % of images, with `count` there and `lift`; `best` (C',)
    is the label with the largest mean response, with `selectivity` and `auroc`. Where `method` is "counts", too few
    images share a label for such numbers: `over` and `count` are the commonest among the examples, the rest is empty.
    """

    method: str
    over: np.ndarray
    count: np.ndarray
    lift: np.ndarray
    best: np.ndarray
    selectivity: np.ndarray
    auroc: np.ndarray


class Stack:
    """Pictures of a stack (N, V, H, W, C) one by one, (H, W, C) uint8 and read-only, the fastest way there is.

    A picture is one chunk, so its bytes can be had as they lie in the file; HDF5's own way to unpack and check them
    takes half as long again. What zlib has packed carries a checksum of its own. Whatever is not as
    `shards.create_images` makes it goes HDF5's way, with its words on what is wrong.
    """

    def __init__(self, images: h5py.Dataset) -> None:
        self._images = images
        self._shape = images.shape[2:]
        self._size = math.prod(self._shape)
        packed = images.compression == "gzip" and images.fletcher32 and not images.shuffle
        self._plain = packed and images.chunks == (1, 1, *self._shape) and images.dtype == np.uint8

    def __getitem__(self, at: tuple[int, int]) -> np.ndarray:
        if self._plain:
            with contextlib.suppress(OSError, RuntimeError, ValueError, zlib.error):
                mask, packed = self._images.id.read_direct_chunk((*at, 0, 0, 0))
                pixels = zlib.decompress(memoryview(packed)[:-4], bufsize=self._size)  # without HDF5's checksum
                if mask == 0 and len(pixels) == self._size:
                    return np.frombuffer(pixels, np.uint8).reshape(self._shape)
        return np.asarray(self._images[at])


class LayerView:
    """One layer of an atlas. `channels` holds the channel numbers that the atlas has, (C',) int32."""

    def __init__(self, group: h5py.Group) -> None:
        self._group = group
        self.name = shards.text(group, "name")
        self.kind = shards.text(group, "kind")
        self.total_channels = shards.numbers(group, "channels")[0]
        self.map_size = (shards.numbers(group, "map_height")[0], shards.numbers(group, "map_width")[0])
        self._kept: dict[str, np.ndarray] | None = None
        self.channels = shards.get(group, "channels")
        self._row = {int(c): i for i, c in enumerate(self.channels)}

    def keep(self) -> "LayerView":
        """Remember every array that is read from now on, read-only, for whoever asks the same layer much; itself."""
        self._kept = {}
        return self

    def _get(self, parent: h5py.Group, name: str) -> np.ndarray:
        if self._kept is None:
            return shards.get(parent, name)
        key = f"{parent.name}/{name}"
        if key not in self._kept:
            self._kept[key] = shards.get(parent, name)
            self._kept[key].flags.writeable = False
        return self._kept[key]

    def fingerprint(self, part: str = "") -> str:
        """sha256 of all that the file holds of this layer, or of one `part` of it, as it is stored; "" without it.

        What is changed, is told; so may be what was only packed otherwise. Pictures count by their own digests.
        """
        if part and part not in self._group:
            return ""
        digest = hashlib.sha256()
        shards.add_stored(digest, self._group[part] if part else self._group, ("images_sha256", "images"))
        return digest.hexdigest()

    @property
    def receptive_field(self) -> tuple[int, int] | None:
        """(height, width) in input pixels that one unit sees, or None for the whole image."""
        height, width = self._geometry[0]
        return (height, width) if height else None

    @functools.cached_property
    def _geometry(self) -> tuple[tuple[int, ...], ...]:
        names = ("receptive_field", "receptive_field_stride", "receptive_field_offset", "input_size")
        return tuple(shards.numbers(self._group, name) for name in names)

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the network's input, in pixels."""
        height, width = self._geometry[3]
        return height, width

    @property
    def presets(self) -> tuple[str, ...]:
        """Presets that this layer has pictures by, the run's main one first."""
        return tuple(self._renders)

    @functools.cached_property
    def _renders(self) -> dict[str, h5py.Group]:
        """Groups of pictures by preset, in their order."""
        if "render" not in self._group:
            return {}
        parent = shards.group(self._group, "render")
        found = [shards.group(parent, name) for name in shards.names(parent)]
        if any("order" not in group.attrs for group in found):  # version 2: one preset, groups by objective
            return {name: shards.group(parent, name) for name in shards.names(parent)}
        found.sort(key=lambda group: shards.numbers(group, "order"))
        return {shards.text(group, "preset"): group for group in found}

    def row(self, channel: int) -> int:
        """Row of `channel` in all arrays of this layer."""
        if int(channel) not in self._row:
            raise AtlasError(
                f"{self.name}:{channel} is not in this atlas. {nearest(str(channel), map(str, self._row))}"
            )
        return self._row[int(channel)]

    def pictures(self, preset: str | None = None) -> h5py.Dataset:
        """All pictures, (C', V, H, W, 3) uint8, as an h5py dataset: slices are read when asked for.

        `preset` is the run's main one, if none is named.
        """
        return shards.dataset(self._render(preset), "images")

    def picture(self, channel: int, preset: str | None = None, variant: int = 0) -> np.ndarray:
        """One picture, (H, W, 3) uint8."""
        return self.pictures(preset)[self.row(channel), variant]

    def stack(self, preset: str | None = None) -> "Stack":
        """All pictures, to read one after another: `stack[row, variant]` is (H, W, C) uint8."""
        return Stack(self.pictures(preset))

    def picture_digests(self, preset: str | None = None) -> np.ndarray | None:
        """sha256 of each picture's pixels, (C', V, 32) uint8; None in an atlas that does not say."""
        group = self._render(preset)
        return self._get(group, "images_sha256") if "images_sha256" in group else None

    def numbers(self, preset: str | None = None, only: Collection[str] = ()) -> dict[str, np.ndarray]:
        """What was measured of the pictures: activation, robust, start, seed, status, …; (C', V) each.

        Beside what is stored: `gain` and `robust_gain`, activation and robust ÷ `natural` (`measures.gain`). The
        measures of `measures` are there as far as the atlas has them: older ones don't. `only` names those to read,
        of what is stored.
        """
        group = self._render(preset)
        left = ("images", "images_sha256", "response")
        wanted = [name for name in shards.names(group) if name not in left and (not only or name in only)]
        found = {name: self._get(group, name) for name in wanted}
        if only:
            return found
        natural, negative = self.natural(preset), self.render_attributes(preset).get("natural") in ("least", "min")
        for name, reached in (("gain", "activation"), ("robust_gain", "robust")):
            if reached in found:
                found[name] = metric_specs.gain(found[reached], natural, negative)
        return found

    def picture_responses(self, preset: str | None = None) -> np.ndarray | None:
        """(C', V, channels of the network's layer) float16: the largest answer of each channel to each picture.

        NaN where a picture is missing; None in an atlas that does not say.
        """
        group = self._render(preset)
        return self._get(group, "response") if "response" in group else None

    @property
    def unrendered(self) -> str:
        """Why this layer has no visualizations by design, such as a missing gradient; empty where it may have some."""
        return str(self._group.attrs.get("unrendered", ""))

    def render_attributes(self, preset: str | None = None) -> dict[str, Any]:
        """Preset, objective, digest, and which statistic of photographs the activation compares with."""
        return shards.plain(self._render(preset))

    def examples(self, which: str = "max") -> Examples | None:
        """Photographs by `which`, or None if the atlas has no such list.

        `max` and `mean`: the largest spatial maxima and means, best first. `min`: the lowest spatial minima, lowest
        first. `spectrum`: drawn from quantile bins of the maxima; see `spectrum_edges`.
        """
        path = f"examples/{which}"
        if path not in self._group:
            return None
        held = shards.group(self._group, path)
        arrays = {key: self._get(held, key) for key in ("value", "index", "y", "x")}
        absent = np.full(arrays["index"].shape, -1, np.int32)
        return Examples(**arrays, map=self._get(held, "map") if "map" in held else absent)

    @property
    def spectrum_edges(self) -> tuple[float, ...]:
        """Edges, in per cent, of the quantile bins of `examples("spectrum")`, whose k places are evenly theirs."""
        if "examples/spectrum" not in self._group:
            return ()
        return tuple(np.asarray(self._group["examples/spectrum"].attrs["edges"]).tolist())

    def heat_map(self, number: int) -> np.ndarray | None:
        """One heat-map, (h, w) float32 responses, averaged to few rows and columns; None for number −1."""
        if number < 0 or "examples/maps" not in self._group:
            return None
        held = shards.group(self._group, "examples/maps")
        low, high = shards.dataset(held, "range")[int(number)]
        return (low + (high - low) * (shards.dataset(held, "value")[int(number)] / np.float32(255))).astype(np.float32)

    def heat_maps(self) -> h5py.Dataset | None:
        """All heat-maps as kept, (pairs, h, w) uint8 from the least response (0) to the largest (255) of each."""
        return shards.dataset(self._group, "examples/maps/value") if "examples/maps" in self._group else None

    def heat_ranges(self) -> np.ndarray | None:
        """(pairs, 2) float32: the responses that 0 and 255 of each heat-map stand for."""
        return self._get(self._group, "examples/maps/range") if "examples/maps" in self._group else None

    def crop(self, number: int) -> Image.Image | None:
        """What the unit of heat-map `number` saw, where the atlas keeps crops instead of pictures."""
        if number < 0 or "examples/maps/jpeg" not in self._group:
            return None
        return jpeg_image(shards.group(self._group, "examples/maps"), int(number))

    def stats(self) -> dict[str, np.ndarray]:
        """Statistics over the photographs by name (mean, sd, max, nonzero, inactive, …), (C',) each."""
        if "stats" not in self._group:
            return {}
        group = shards.group(self._group, "stats")
        return {name: self._get(group, name) for name in shards.names(group)}

    @property
    def population_sparsity(self) -> float:
        """Mean sparsity of the layer's answer to one photograph, 0 … 1; NaN if nothing fired or nobody measured."""
        held = self._group.get("stats")
        return float(held.attrs.get("population_sparsity", np.nan)) if isinstance(held, h5py.Group) else float("nan")

    def histogram(self) -> Histogram | None:
        """Histograms of per-image maxima, or None without examples."""
        if "histogram" not in self._group:
            return None
        counts, ends = self._get(self._group, "histogram/counts"), self._get(self._group, "histogram/ends")
        low, high = self._get(self._group, "histogram/range").T[..., None]
        edges = low + (high - low) * np.linspace(0, 1, counts.shape[1] - 1)
        return Histogram(counts[:, 1:-1], edges, counts[:, 0], counts[:, -1], ends)

    def quantiles(self, shares: Sequence[float]) -> np.ndarray:
        """(C', q) quantiles of per-image maxima at `shares` (0 … 1), to the width of a bin; NaN without examples."""
        found = self.histogram()
        result = np.full((len(self.channels), len(shares)), np.nan)
        if found is None:
            return result
        heaps = np.concatenate([found.under[:, None], found.counts, found.over[:, None]], 1).cumsum(1)
        for row, heap in enumerate(heaps):
            low, high = found.ends[row]
            borders = [min(low, found.edges[row, 0]), *found.edges[row], max(high, found.edges[row, -1])]
            if heap[-1]:
                result[row] = np.interp(np.asarray(shares) * heap[-1], [0, *heap], np.clip(borders, low, high))
        return result

    def labels(self) -> Labels | None:
        """Which labels of the dataset each unit goes with, or None where the dataset has none."""
        if "labels" not in self._group:
            return None
        group = shards.group(self._group, "labels")
        return Labels(shards.text(group, "method"), **{name: self._get(group, name) for name in shards.names(group)})

    def wiring(self, side: str) -> Wiring | None:
        """`inputs` or `outputs`: what each unit is wired to in the layer before or after; None where nobody knows."""
        if f"wiring/{side}" not in self._group:
            return None
        held = shards.group(self._group, f"wiring/{side}")
        return Wiring(shards.text(held, "layer"), **{key: self._get(held, key) for key in ("channel", "norm", "sum")})

    def responses(self) -> np.ndarray | None:
        """(C', n) float16 maxima of every unit on the photographs `Atlas.responses_index`; None without examples."""
        return self._get(self._group, "responses") if "responses" in self._group else None

    def similar(self, channel: int, count: int = 8) -> pd.DataFrame:
        """The units of this layer whose responses go most with those of `channel`: channel, correlation; best first.

        Pearson's correlation over the photographs drawn for the purpose.
        """
        kept = self.responses()
        if kept is None or kept.shape[1] < 2:
            return pd.DataFrame({"channel": np.zeros(0, np.int32), "correlation": np.zeros(0, np.float32)})
        centred = kept.astype(np.float32)
        centred -= centred.mean(1, keepdims=True)
        norm = np.linalg.norm(centred, axis=1)
        own = self.row(channel)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = centred @ centred[own] / (norm * norm[own])
        found = np.where(np.isfinite(found), found, -2)
        found[own] = -2
        order = np.argsort(-found, kind="stable")[:count]
        order = order[found[order] > -2]
        return pd.DataFrame({"channel": self.channels[order], "correlation": found[order].astype(np.float32)})

    def natural(self, preset: str | None = None) -> np.ndarray:
        """Best response of any photograph by the objective's own measure, (C',); NaN without examples."""
        measure = str(self.render_attributes(preset).get("natural", ""))
        key = {"mean": "best_mean", "max": "max", "least": "least_mean", "min": "min"}.get(measure, "")
        held = f"stats/{key}"
        return (
            self._get(self._group, held)
            if key and held in self._group
            else np.full(len(self.channels), np.nan, np.float32)
        )

    def crop_box(self, y: int, x: int, least: int = 48) -> tuple[int, int, int, int] | None:
        """(left, top, right, bottom) of what unit (y, x) sees, in pixels of the network's input.

        Grown to at least `least` pixels, so that a person can see it, and moved inside the input; None where
        a unit sees the whole image.
        """
        size, stride, offset, limits = self._geometry
        if not size[0]:
            return None
        return crops.seen(int(y), int(x), size, stride, offset, limits, least)

    def source_box(self, photo: ShownPhoto, y: int, x: int, least: int = 48) -> tuple[int, int, int, int] | None:
        """(left, top, right, bottom) of what unit (y, x) sees, in pixels of the source picture and clipped to it.

        `least` is in pixels of the network's input; None where a unit sees the whole image.
        """
        box = self.crop_box(y, x, least)
        return None if box is None else crops.in_picture(box, self.input_size, photo.box, photo.size)

    def _render(self, preset: str | None) -> h5py.Group:
        if not self._renders:
            raise AtlasError(f"{self.name} has no pictures; `atlas render` makes them.")
        if preset is None:
            return next(iter(self._renders.values()))
        if preset not in self._renders:
            raise AtlasError(f"{self.name} has no pictures by {preset!r}. {nearest(preset, self.presets)}")
        return self._renders[preset]
