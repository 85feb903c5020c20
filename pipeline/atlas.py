"""Read an atlas: layers, units, pictures, examples and statistics as NumPy and pandas, lazily.

    import pipeline
    with pipeline.open_atlas("runs/efficientnet_lite0-distill") as atlas:
        layer = atlas["blocks.4.2"]
        picture = layer.picture(layer.channels[0])     # (H, W, 3) uint8
        best = layer.examples("max")                   # value, index, y, x: (C', k) each
        table = atlas.units()                          # one row a picture

The site and every comparison read through this module and nothing else.
"""

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from PIL import Image

from pipeline import shards
from pipeline.errors import AtlasError, nearest

SCHEMA = "neuron-atlas"
SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Examples:
    """The best photographs of each unit of a layer, best first; (C', k) arrays, `index` −1 where there is none.

    `value` is the response, `index` the photograph's row in the dataset, `y` and `x` the place on the map.
    """

    value: np.ndarray
    index: np.ndarray
    y: np.ndarray
    x: np.ndarray


class LayerView:
    """One layer of an atlas. `channels` holds the channel numbers that the atlas has, (C',) int32."""

    def __init__(self, group: h5py.Group) -> None:
        self._group = group
        self.name = shards.text(group, "name")
        self.kind = shards.text(group, "kind")
        self.total_channels = shards.numbers(group, "channels")[0]
        self.map_size = (shards.numbers(group, "map_height")[0], shards.numbers(group, "map_width")[0])
        self.channels = shards.get(group, "channels")
        self._row = {int(c): i for i, c in enumerate(self.channels)}

    @property
    def receptive_field(self) -> tuple[int, int] | None:
        """(height, width) in input pixels that one unit sees, or None for the whole image."""
        height, width = shards.numbers(self._group, "receptive_field")
        return (height, width) if height else None

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the network's input, in pixels."""
        height, width = shards.numbers(self._group, "input_size")
        return height, width

    @property
    def objectives(self) -> tuple[str, ...]:
        """Objectives that this layer has pictures for."""
        return tuple(shards.names(shards.group(self._group, "render"))) if "render" in self._group else ()

    def row(self, channel: int) -> int:
        """Row of `channel` in all arrays of this layer."""
        if int(channel) not in self._row:
            raise AtlasError(
                f"{self.name}:{channel} is not in this atlas. {nearest(str(channel), map(str, self._row))}"
            )
        return self._row[int(channel)]

    def pictures(self, objective: str = "channel") -> h5py.Dataset:
        """All pictures, (C', V, H, W, 3) uint8, as an h5py dataset: slices are read when asked for."""
        return shards.dataset(self._render(objective), "images")

    def picture(self, channel: int, objective: str = "channel", variant: int = 0) -> np.ndarray:
        """One picture, (H, W, 3) uint8."""
        return self.pictures(objective)[self.row(channel), variant]

    def numbers(self, objective: str = "channel") -> dict[str, np.ndarray]:
        """What was measured of the pictures: activation, robust, start, seed, status, …; (C', V) each."""
        group = self._render(objective)
        return {name: shards.get(group, name) for name in shards.names(group) if not name.startswith("images")}

    def render_attributes(self, objective: str = "channel") -> dict[str, Any]:
        """Preset, its digest, and which statistic of photographs the activation compares with."""
        return shards.plain(self._render(objective))

    def examples(self, which: str = "max") -> Examples | None:
        """The best photographs by `which`, or None if the atlas has no examples."""
        path = f"examples/{which}"
        if path not in self._group:
            return None
        return Examples(*(shards.get(self._group, f"{path}/{key}") for key in ("value", "index", "y", "x")))

    def stats(self) -> dict[str, np.ndarray]:
        """Statistics over the photographs by name (mean, max, nonzero, best_mean), (C',) each."""
        if "stats" not in self._group:
            return {}
        group = shards.group(self._group, "stats")
        return {name: shards.get(group, name) for name in shards.names(group)}

    def natural(self, objective: str = "channel") -> np.ndarray:
        """Best response of any photograph by the objective's own measure, (C',); NaN without examples."""
        measure = shards.text(self._render(objective), "natural")
        key = {"mean": "best_mean", "max": "max", "min": "min"}.get(measure, "")
        return self.stats().get(key, np.full(len(self.channels), np.nan, np.float32))

    def crop_box(self, y: int, x: int, least: int = 48) -> tuple[int, int, int, int] | None:
        """(left, top, right, bottom) of what unit (y, x) sees, in pixels of the network's input.

        Grown to at least `least` pixels, so that a person can see it, and moved inside the input; None where
        a unit sees the whole image.
        """
        if self.receptive_field is None:
            return None
        size, stride, offset, limits = (
            shards.numbers(self._group, name)
            for name in ("receptive_field", "receptive_field_stride", "receptive_field_offset", "input_size")
        )
        box = []
        for axis, position in enumerate((y, x)):
            middle = position * stride[axis] + offset[axis] + size[axis] / 2
            side = min(max(size[axis], least), limits[axis])
            start = min(max(round(middle - side / 2), 0), limits[axis] - side)
            box.append((start, start + side))
        return box[1][0], box[0][0], box[1][1], box[0][1]

    def _render(self, objective: str) -> h5py.Group:
        if objective not in self.objectives:
            raise AtlasError(f"{self.name} has no pictures for {objective!r}. {nearest(objective, self.objectives)}")
        return shards.group(self._group, f"render/{objective}")


class Atlas:
    """An open atlas; a context manager. Index it by layer name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = h5py.File(path, "r", locking=False)
        except OSError as error:
            raise AtlasError(f"{path} can't be opened as HDF5: {error}") from error
        root = shards.plain(self._file)
        if root.get("schema") != SCHEMA:
            self.close()
            raise AtlasError(f"{path} is no neuron atlas.")
        version = int(root["schema_version"])
        if version > SCHEMA_VERSION:
            self.close()
            raise AtlasError(
                f"{path} has schema version {version}; this program reads up to {SCHEMA_VERSION}. Update it."
            )
        parent = shards.group(self._file, "layers")
        groups = sorted(
            (shards.group(parent, name) for name in shards.names(parent)), key=lambda g: shards.numbers(g, "order")
        )
        self._shown = (
            shards.get(self._file, "dataset/shown/index") if "dataset/shown" in self._file else np.zeros(0, np.int32)
        )
        self._layers = {shards.text(group, "name"): group for group in groups}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "Atlas":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[LayerView]:
        return (LayerView(group) for group in self._layers.values())

    def __getitem__(self, name: str) -> LayerView:
        if name not in self._layers:
            raise AtlasError(f"This atlas has no layer {name!r}. {nearest(name, self._layers)}")
        return LayerView(self._layers[name])

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names, in the order of computation."""
        return tuple(self._layers)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the root: schema, model, weights_sha256, dataset_fingerprint, created, versions, …"""
        found = shards.plain(self._file)
        found["versions"] = json.loads(found.get("versions", "{}"))
        return found

    @property
    def config(self) -> str:
        """The configuration that made this atlas, as YAML."""
        return str(shards.dataset(self._file, "provenance/config").asstr()[()])

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names of the network's outputs, if it has any."""
        return tuple(shards.get(self._file, "model/labels").tolist()) if "model/labels" in self._file else ()

    def dataset(self) -> pd.DataFrame:
        """The photographs, one a row: path, label, source (equal for crops of one picture)."""
        if "dataset/path" not in self._file:
            return pd.DataFrame({"path": [], "label": [], "source": []})
        return pd.DataFrame({key: shards.get(self._file, f"dataset/{key}") for key in ("path", "label", "source")})

    def photo(self, index: int) -> Image.Image | None:
        """A photograph as the network saw it, if it is shown anywhere in this atlas."""
        at = int(np.searchsorted(self._shown, index))
        if at == len(self._shown) or self._shown[at] != index:
            return None
        start, end = shards.dataset(self._file, "dataset/shown/offset")[at : at + 2]
        return Image.open(io.BytesIO(shards.dataset(self._file, "dataset/shown/jpeg")[int(start) : int(end)].tobytes()))

    def units(self) -> pd.DataFrame:
        """One row a picture: layer, channel, objective, variant, its numbers, and the best natural response."""
        frames = []
        for layer in self:
            stats = layer.stats()
            for objective in layer.objectives:
                numbers = layer.numbers(objective)
                variants = numbers["activation"].shape[1]
                frame = pd.DataFrame(
                    {
                        "layer": layer.name,
                        "channel": np.repeat(layer.channels, variants),
                        "objective": objective,
                        "variant": np.tile(np.arange(variants), len(layer.channels)),
                        **{k: v.reshape(-1) for k, v in numbers.items() if v.ndim == 2},
                        "natural": np.repeat(layer.natural(objective), variants),
                        **{k: np.repeat(v, variants) for k, v in stats.items() if v.ndim == 1},
                    }
                )
                frames.append(frame)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def open_atlas(path: str | Path) -> Atlas:
    """Open `atlas.h5`, given the file or its run folder."""
    path = Path(path)
    if path.is_dir():
        path = path / "atlas.h5"
    if not path.is_file():
        raise AtlasError(f"There is no atlas at {path}. `atlas run` makes one.")
    return Atlas(path)
