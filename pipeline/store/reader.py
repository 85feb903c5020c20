"""Read an atlas: layers, units, pictures, examples and statistics as NumPy and pandas, lazily.

    import pipeline
    with pipeline.open_atlas("runs/efficientnet_lite0-distill") as atlas:
        layer = atlas["blocks.4.2"]
        picture = layer.picture(layer.channels[0])     # (H, W, 3) uint8
        best = layer.examples("max")                   # value, index, y, x, map: (C', k) each
        heat = layer.heat_map(best.map[0, 0])          # (h, w) float32
        table = atlas.units()                          # one row a picture

The site and every comparison read through this module and nothing else.
"""

import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from PIL import Image

from pipeline.core.errors import AtlasError, nearest
from pipeline.store import shards
from pipeline.store.layer_view import LayerView, ShownPhoto

SCHEMA = "neuron-atlas"
SCHEMA_VERSION = 3

_BOX = ("left", "top", "right", "bottom")


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

    @property
    def dataset_labels(self) -> tuple[str, ...]:
        """Labels of the dataset, by the numbers that `LayerView.labels` gives them."""
        return tuple(shards.get(self._file, "dataset/labels").tolist()) if "dataset/labels" in self._file else ()

    @property
    def responses_index(self) -> np.ndarray:
        """(n,) rows in the dataset of the photographs whose responses are kept for every unit."""
        held = "dataset/responses" in self._file
        return shards.get(self._file, "dataset/responses") if held else np.zeros(0, np.int32)

    @property
    def examples_store(self) -> str:
        """What of the dataset this file holds: `images`, `crops` or `ids`."""
        held = self._file.get("dataset/shown")
        return str(held.attrs.get("store", "images")) if isinstance(held, h5py.Group) else "ids"

    def shown(self, index: int) -> ShownPhoto | None:
        """Size and place of a photograph that is an example of any unit; None if it is of none."""
        at = int(np.searchsorted(self._shown, index))
        if at == len(self._shown) or self._shown[at] != index or self._boxes is None:
            return None
        width, height, left, top, right, bottom = self._boxes[at].tolist()
        return ShownPhoto(int(index), (int(width), int(height)), (left, top, right, bottom))

    @functools.cached_property
    def _boxes(self) -> np.ndarray | None:
        """(shown, 6) width, height, left, top, right, bottom of each photograph shown; None in old atlases."""
        if "dataset/shown/box" not in self._file:
            return None
        return np.concatenate([shards.get(self._file, f"dataset/shown/{name}") for name in ("size", "box")], 1)

    @functools.cached_property
    def _jpegs(self) -> tuple[np.ndarray, h5py.Dataset] | None:
        """Offsets of the whole pictures, and their bytes; None in an atlas that does not hold them."""
        if "dataset/shown/jpeg" not in self._file:
            return None
        return shards.get(self._file, "dataset/shown/offset"), shards.dataset(self._file, "dataset/shown/jpeg")

    def shown_photographs(self) -> pd.DataFrame:
        """All that `shown` tells, one photograph a row: index, width, height, left, top, right, bottom; pixels."""
        if self._boxes is None:
            return pd.DataFrame(columns=["index", "width", "height", *_BOX])
        table = pd.DataFrame(self._boxes, columns=["width", "height", *_BOX])
        table.insert(0, "index", self._shown)
        return table

    def picture(self, index: int) -> Image.Image | None:
        """The whole source picture of a photograph, made smaller, if this atlas holds it."""
        at = int(np.searchsorted(self._shown, index))
        if at == len(self._shown) or self._shown[at] != index or self._jpegs is None:
            return None
        offsets, data = self._jpegs
        return Image.open(io.BytesIO(data[int(offsets[at]) : int(offsets[at + 1])].tobytes()))

    def photo(self, index: int) -> Image.Image | None:
        """A photograph as the network saw it, cut from `picture`, if this atlas holds it."""
        picture, shown = self.picture(index), self.shown(index)
        if picture is None or shown is None:
            return picture
        scale = [a / b for a, b in zip(picture.size, shown.size, strict=True)] * 2
        left, top, right, bottom = (round(v * s) for v, s in zip(shown.box, scale, strict=True))
        return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))

    def units(self) -> pd.DataFrame:
        """One row a picture: layer, channel, preset, objective, variant, its numbers, and the best natural response."""
        frames = []
        for layer in self:
            stats = layer.stats()
            for preset in layer.presets:
                numbers = layer.numbers(preset)
                variants = numbers["activation"].shape[1]
                frame = pd.DataFrame(
                    {
                        "layer": layer.name,
                        "channel": np.repeat(layer.channels, variants),
                        "preset": preset,
                        "objective": str(layer.render_attributes(preset).get("objective", preset)),
                        "variant": np.tile(np.arange(variants), len(layer.channels)),
                        **{k: v.reshape(-1) for k, v in numbers.items() if v.ndim == 2},
                        "natural": np.repeat(layer.natural(preset), variants),
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
