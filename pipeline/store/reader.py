"""The read API of an atlas: layers, units, visualizations, examples and statistics as NumPy and pandas, read lazily.

    import pipeline
    with pipeline.open_atlas("runs/efficientnet_lite0-distill") as atlas:
        layer = atlas["blocks.4.2"]
        image = layer.image(layer.channels[0])       # feature visualization, (H, W, 3) uint8
        best = layer.examples("max")                   # value, index, y, x, map: (C', k) each
        heat = layer.heat_map(best.map[0, 0])          # (h, w) float32
        table = atlas.units()                          # one row per visualization

The site and the comparison of runs read atlases through this module only.
"""

import contextlib
import dataclasses
import functools
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import yaml
from PIL import Image

from pipeline.core.config_files import URL_START, load_yaml
from pipeline.core.errors import AtlasError, first_line, nearest_names
from pipeline.data.readers.samples import credits_of
from pipeline.store import hdf5, structure
from pipeline.store.layer_view import LayerView, ShownImage

SCHEMA = "neuron-atlas"
SCHEMA_VERSION = 5
# Older files are refused; see "Versions" in docs/store.md.
OLDEST_SCHEMA_VERSION = 2

# Arrays of `/model/layers`, one entry per layer of the network.
NETWORK_LAYER_ARRAYS = ("name", "kind", "channels", "height", "width")

_BOX = ("left", "top", "right", "bottom")


@dataclasses.dataclass(frozen=True)
class NetworkLayer:
    """A layer that units could be chosen from, whether or not the atlas has any of it.

    Attributes:
        name: Name of the layer.
        kind: Kind of the layer.
        channels: Number of its channels.
        map_size: (height, width) of its activation map.
        source: What it reads: the number of a layer, or the number of all layers plus that of a join
            (`Atlas.network_joins`); −1 if it reads no layer. None in old files.
    """

    name: str
    kind: str
    channels: int
    map_size: tuple[int, int]
    source: int | None = None


class Atlas:
    """An open atlas: a context manager, and a mapping from layer names to `LayerView`.

    Iteration yields the views in the order of computation.

    Args:
        path: The file `atlas.h5`.

    Raises:
        AtlasError: If the file cannot be opened, is not an atlas, or has an unknown schema version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = h5py.File(path, "r", locking=False)
        except OSError as error:
            raise AtlasError(f"{path} can't be opened as HDF5: {error}") from error
        try:
            self._open(path)
        except AtlasError:
            self.close()
            raise
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            self.close()
            raise AtlasError(f"{path} is not a complete atlas: {first_line(error)}") from error

    def _open(self, path: Path) -> None:
        """Check the root of the file, and find the layers."""
        root = hdf5.all_attributes(self._file)
        if root.get("schema") != SCHEMA:
            raise AtlasError(f"{path} is not a neuron atlas.")
        version = int(root["schema_version"])
        if version > SCHEMA_VERSION:
            raise AtlasError(
                f"{path} has schema version {version}; this program reads up to {SCHEMA_VERSION}. Update it."
            )
        if version < OLDEST_SCHEMA_VERSION:
            raise AtlasError(
                f"{path} has schema version {version}; this program reads {OLDEST_SCHEMA_VERSION} to {SCHEMA_VERSION}. "
                "Read it with the version that wrote it, or make it again with `atlas run`."
            )
        links = structure.links(self._file)
        if links:
            raise AtlasError(f"{path} is refused: {links[0][0]} {links[0][1]}.")
        parent = hdf5.group(self._file, "layers")
        groups = [hdf5.group(parent, name) for name in hdf5.member_names(parent)]
        groups.sort(key=lambda group: hdf5.integer_attribute(group, "order"))
        self._layers = {hdf5.text_attribute(group, "name"): group for group in groups}
        self._views: dict[str, LayerView] | None = None
        self._shown = np.zeros(0, np.int32)  # sorted rows of the dataset images that are examples of some unit
        if "dataset/shown" in self._file:
            self._shown = hdf5.read_array(self._file, "dataset/shown/index")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "Atlas":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[LayerView]:
        return map(self._view, self._layers)

    def __getitem__(self, name: str) -> LayerView:
        if name not in self._layers:
            raise AtlasError(f"This atlas has no layer {name!r}. {nearest_names(name, self._layers)}")
        return self._view(name)

    def _view(self, name: str) -> LayerView:
        if self._views is None:
            return LayerView(self._layers[name])
        if name not in self._views:
            self._views[name] = LayerView(self._layers[name]).with_cache()
        return self._views[name]

    @contextlib.contextmanager
    def caching(self) -> Iterator[None]:
        """Keep the arrays of layers that are read in this context, as read-only arrays, until it ends.

        For callers that read the same numbers in several ways; images are not kept.
        """
        self._views = {}
        try:
            yield
        finally:
            self._views = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names, in the order of computation."""
        return tuple(self._layers)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the root: schema, model, weights_sha256, dataset_fingerprint, created, versions, …"""
        attributes = hdf5.all_attributes(self._file)
        attributes["versions"] = json.loads(attributes.get("versions", "{}"))
        return attributes

    @property
    def config(self) -> str:
        """The configuration of the run, as YAML, without the places of the machine that it was made on."""
        # Earlier versions wrote those, too.
        return published(str(hdf5.dataset(self._file, "provenance/config").asstr()[()]))

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names of the network's outputs; empty if it has none."""
        return tuple(hdf5.read_array(self._file, "model/labels").tolist()) if "model/labels" in self._file else ()

    @property
    def depths(self) -> tuple[str, ...]:
        """Names of the layers at which the paths of images are measured (`LayerView.path_curves`); empty in old files.

        The path of a unit has those of them that lie before its layer, and the layer itself.
        """
        return tuple(hdf5.read_array(self._file, "model/depths").tolist()) if "model/depths" in self._file else ()

    @property
    def network_layers(self) -> tuple[NetworkLayer, ...]:
        """All layers of the network that units could be chosen from, in order; empty in old files."""
        if "model/layers" not in self._file:
            return ()
        columns = [hdf5.read_array(self._file, f"model/layers/{key}").tolist() for key in NETWORK_LAYER_ARRAYS]
        has_sources = "model/layers/source" in self._file
        sources = (
            hdf5.read_array(self._file, "model/layers/source").tolist() if has_sources else [None] * len(columns[0])
        )
        return tuple(
            NetworkLayer(name, kind, channels, (height, width), source)
            for name, kind, channels, height, width, source in zip(*columns, sources, strict=True)
        )

    @property
    def network_joins(self) -> tuple[tuple[int, ...], ...]:
        """Where values of several layers come together, as sums or concatenations: what each is made of.

        Numbers are those of `NetworkLayer.source`. Empty in old files.
        """
        if "model/joins" not in self._file:
            return ()
        pairs = hdf5.read_array(self._file, "model/joins").tolist()
        joins: list[list[int]] = []
        for join, node in pairs:
            joins += [[] for _ in range(join + 1 - len(joins))]
            joins[join].append(node)
        return tuple(map(tuple, joins))

    def dataset(self) -> pd.DataFrame:
        """Return the dataset, one row per image: path, label, source (equal for crops of one source image)."""
        if "dataset/path" not in self._file:
            return pd.DataFrame({"path": [], "label": [], "source": []})
        return pd.DataFrame({key: hdf5.read_array(self._file, f"dataset/{key}") for key in ("path", "label", "source")})

    @property
    def credits(self) -> tuple[str, ...]:
        """Authors who must be named where the dataset images are shown."""
        if "dataset/credits" in self._file:
            return tuple(hdf5.read_array(self._file, "dataset/credits").tolist())
        return credits_of(self.dataset()["path"])  # an atlas of an earlier version

    @property
    def dataset_labels(self) -> tuple[str, ...]:
        """Labels of the dataset; `LayerView.labels` returns indices into them."""
        return tuple(hdf5.read_array(self._file, "dataset/labels").tolist()) if "dataset/labels" in self._file else ()

    @property
    def responses_index(self) -> np.ndarray:
        """Rows in the dataset of the images in `LayerView.dataset_activations`, (n,)."""
        if "dataset/responses" not in self._file:
            return np.zeros(0, np.int32)
        return hdf5.read_array(self._file, "dataset/responses")

    @property
    def effects_index(self) -> np.ndarray:
        """Rows in the dataset of the images that effects were measured over, (n,); empty without effects."""
        return hdf5.read_array(self._file, "effects/index") if "effects/index" in self._file else np.zeros(0, np.int32)

    @property
    def effects_top(self) -> np.ndarray:
        """The largest output of the network for each of `effects_index`, (n,) int32."""
        return hdf5.read_array(self._file, "effects/top") if "effects/top" in self._file else np.zeros(0, np.int32)

    @property
    def effects_outputs(self) -> str:
        """Name of the layer of these outputs, as the logits; empty without effects."""
        return hdf5.text_attribute(hdf5.group(self._file, "effects"), "outputs") if "effects" in self._file else ""

    @property
    def examples_store(self) -> str:
        """What the file contains of the dataset: `images`, `crops` or only `ids`."""
        group = self._file.get("dataset/shown")
        return str(group.attrs.get("store", "images")) if isinstance(group, h5py.Group) else "ids"

    def image_geometry(self, index: int) -> ShownImage | None:
        """Return the geometry of dataset image `index`, or None if it is not an example of any unit."""
        row = self._shown_row(index)
        if row is None or self._boxes is None:
            return None
        width, height, left, top, right, bottom = self._boxes[row].tolist()
        return ShownImage(int(index), (int(width), int(height)), (left, top, right, bottom))

    def _shown_row(self, index: int) -> int | None:
        """Return the row of dataset image `index` in the arrays of `dataset/shown`, or None if it is not among them."""
        row = int(np.searchsorted(self._shown, index))
        return row if row < len(self._shown) and self._shown[row] == index else None

    @functools.cached_property
    def _boxes(self) -> np.ndarray | None:
        """(shown, 6) width, height, left, top, right, bottom of each image in `dataset/shown`; None in old atlases."""
        if "dataset/shown/box" not in self._file:
            return None
        return np.concatenate([hdf5.read_array(self._file, f"dataset/shown/{name}") for name in ("size", "box")], 1)

    @functools.cached_property
    def _jpegs(self) -> tuple[np.ndarray, h5py.Dataset] | None:
        """Offsets and JPEG bytes of the whole source images; None in an atlas that does not contain them."""
        if "dataset/shown/jpeg" not in self._file:
            return None
        return hdf5.read_array(self._file, "dataset/shown/offset"), hdf5.dataset(self._file, "dataset/shown/jpeg")

    def image_geometries(self) -> pd.DataFrame:
        """Return the geometry of all examples, one row per image, in pixels.

        The columns are index, width, height, left, top, right, bottom.
        """
        if self._boxes is None:
            return pd.DataFrame(columns=["index", "width", "height", *_BOX])
        table = pd.DataFrame(self._boxes, columns=["width", "height", *_BOX])
        table.insert(0, "index", self._shown)
        return table

    def source_image(self, index: int) -> Image.Image | None:
        """Return the downscaled source image of dataset image `index`, or None if the atlas does not contain it."""
        row = self._shown_row(index)
        if row is None or self._jpegs is None:
            return None
        offsets, data = self._jpegs
        return Image.open(io.BytesIO(data[int(offsets[row]) : int(offsets[row + 1])].tobytes()))

    def input_image(self, index: int) -> Image.Image | None:
        """Return the part of `picture(index)` that became the network's input, or None if it is not contained."""
        picture, shown = self.source_image(index), self.image_geometry(index)
        if picture is None or shown is None:
            return picture
        scale = [a / b for a, b in zip(picture.size, shown.size, strict=True)] * 2
        left, top, right, bottom = (round(v * s) for v, s in zip(shown.box, scale, strict=True))
        return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))

    def units(self) -> pd.DataFrame:
        """Return a table with one row per feature visualization.

        The columns are layer, channel, preset, objective, variant, those of `LayerView.measurements`, natural
        (`LayerView.dataset_max`), the statistics of `LayerView.stats`, the numbers of `LayerView.judgements` as
        JUDGE.rank, JUDGE.probability and so on, of `LayerView.effects` the mean as effect and the size as effect_size,
        and of `LayerView.facets` facets, the number of facets, and monosemanticity.
        """
        frames = []
        for layer in self:
            stats, effects = layer.stats(), layer.effects()
            if effects is not None:
                stats |= {"effect": effects.mean, "effect_size": effects.size}
            stats |= layer.facet_numbers()
            for preset in layer.presets:
                numbers = layer.measurements(preset)
                variants = numbers["activation"].shape[1]
                frame = pd.DataFrame(
                    {
                        "layer": layer.name,
                        "channel": np.repeat(layer.channels, variants),
                        "preset": preset,
                        "objective": str(layer.render_attributes(preset).get("objective", preset)),
                        "variant": np.tile(np.arange(variants), len(layer.channels)),
                        **{k: v.reshape(-1) for k, v in numbers.items() if v.ndim == 2},
                        "natural": np.repeat(layer.dataset_max(preset), variants),
                        **{k: np.repeat(v, variants) for k, v in stats.items() if v.ndim == 1},
                        **{
                            f"{judgement.judge}.{k}": v.reshape(-1)
                            for judgement in layer.judgements(preset)
                            for k, v in judgement.numbers.items()
                        },
                    }
                )
                frames.append(frame)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def open_atlas(path: str | Path) -> Atlas:
    """Open the atlas at `path`, which is the file `atlas.h5` or the folder of its run.

    Raises:
        AtlasError: If there is no atlas, or it cannot be opened.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "atlas.h5"
    if not path.is_file():
        raise AtlasError(f"There is no atlas at {path}; `atlas run` makes one.")
    return Atlas(path)


def published(config: str) -> str:
    """Return a configuration (YAML) without places of this machine: of paths to them only the last part remains.

    An atlas and its site are published; names of users and mounts are nobody's business. Empty for invalid YAML.
    """
    try:
        tree = load_yaml(config, "config.yaml")
    except AtlasError:
        return ""
    return yaml.safe_dump(_without_places(tree), sort_keys=False, allow_unicode=True)


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    if isinstance(value, str) and re.match(rf"/|~|\.\.[/\\]|[A-Za-z]:[/\\]|\\\\|(?!https?:){URL_START}", value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def check_structure(path: str | Path) -> None:
    """Check an atlas that somebody else may have made: its members, types, shapes and sizes (`store.structure`).

    Raises:
        AtlasError: If there is no atlas, or if it cannot be read safely.
    """
    with open_atlas(path) as atlas:
        faults = structural_faults(atlas.path)
    if faults:
        more = f" (and {len(faults) - 1} more; `atlas verify` lists them)" if faults[1:] else ""
        raise AtlasError(f"{atlas.path} is refused: {faults[0][0]} {faults[0][1]}{more}.")


def structural_faults(path: Path) -> list[tuple[str, str]]:
    """Return what is wrong with the structure of an atlas as (place, description); see `store.structure`."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return structure.faults(file)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        return [(path.name, f"can't be read: {first_line(error)}")]
