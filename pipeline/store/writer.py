"""`atlas.h5`: combine all shards of a run in one file, and verify such a file.

The schema is described in docs/store.md. The compressed chunks of images and masks are copied without
recompression. The file is written under a temporary name and then renamed, so that no reader sees an incomplete one.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from pipeline.activation_atlas.results import AtlasResult
from pipeline.core.config_files import stored_settings
from pipeline.core.errors import AtlasError, first_line
from pipeline.core.metric_specs import IMAGE_METRICS, METRICS, RENDER_METRICS, Metric, is_minimized
from pipeline.core.seeds import seed_of
from pipeline.data.image_table import ImageTable
from pipeline.data.readers.base import DatasetImage
from pipeline.data.readers.samples import credits_of
from pipeline.effects.results import EffectsResult
from pipeline.examples.channel_stats import channel_statistics
from pipeline.examples.localize import TopExamples
from pipeline.examples.results import DatasetPassResult
from pipeline.examples.rotation import rotation_number
from pipeline.facets.results import FacetsResult
from pipeline.images import metrics
from pipeline.judges.judgement import RANGES, Judgement
from pipeline.layers.connections import Connectivity
from pipeline.layers.dataflow import Dataflow
from pipeline.layers.dictionaries import DictionaryLayer
from pipeline.layers.finding import Layer
from pipeline.layers.pixel_kernels import PixelKernels
from pipeline.store import hdf5, shards, structure
from pipeline.store.activation_atlas import activation_atlas_faults, write_activation_atlas
from pipeline.store.effects import write_effects
from pipeline.store.facets import facets_faults, write_facets
from pipeline.store.hdf5 import write_array, write_jpegs
from pipeline.store.layer_view import DISPLAY_OF, LayerView
from pipeline.store.path_means import PATH_LAYERS, depth_means, path_layers, stored_path
from pipeline.store.path_relations import PathUnits, path_relations
from pipeline.store.reader import NETWORK_LAYER_ARRAYS, SCHEMA, SCHEMA_VERSION, open_atlas, published, structural_faults
from pipeline.store.shards import DamagedShardError, Shard, safe_name
from pipeline.store.wiring import SEPARATOR, write_attributed, write_wiring
from pipeline.visualization.objectives import compared_examples, not_of_activations

LIBRARIES = ("neuron-atlas", "torch", "torchvision", "timm", "h5py", "numpy", "pillow")
# Bytes that `verify` reads at once.
READ_BYTES = 1 << 24
# Activations of dataset examples that are compared at once.
TRANSFER_VALUES = 1 << 27


@dataclasses.dataclass(frozen=True)
class Content:
    """The content of an atlas, except for the feature visualizations.

    Attributes:
        run: Name of the run.
        model: Name of the network.
        weights: sha256 of the network's weights.
        config_yaml: The configuration of the run, as YAML.
        labels: Class names of the network's outputs.
        input_size: (height, width) of the network's input.
        layers: Layers with the channels of each that the atlas contains, in the order of computation.
        photos: All dataset images.
        dataset_fingerprint: Digest of the dataset.
        examples: Result of the dataset pass, or None.
        inputs: Connections to a layer before, by layer name.
        outputs: Connections to a layer after, by layer name.
        failures: Number of units that failed.
        identity: Digest of everything that the atlas was made from.
        unrendered: Why a layer cannot have visualizations, by layer name.
        visualized: Channels that are selected for visualization, by layer name; all of a layer that is not there.
        judgements: What other networks say about the visualizations, by layer name and preset.
        kernels: Kernels of the channels of layers that are linear in the pixels, by layer name.
        depths: Names of the fixed depths of the network at which the paths of images are measured.
        network_layers: All layers that units could be chosen from, in the order of the network.
        dataflow: What these layers read, if it is known.
        dataset_pass: Digest of the first pass over the dataset; "" without one.
        displays: For presets of display images, the preset whose visualizations they show larger.
        effects: Effects of the units on the outputs of the network, or None.
        activation_atlases: Activation atlases, by layer name.
        facets: Facets of units, by layer name.
    """

    run: str
    model: str
    weights: str
    config_yaml: str
    labels: tuple[str, ...]
    input_size: tuple[int, int]
    layers: Sequence[tuple[Layer, tuple[int, ...]]]
    photos: Sequence[DatasetImage] = ()
    dataset_fingerprint: str = ""
    examples: DatasetPassResult | None = None
    inputs: Mapping[str, Connectivity] = dataclasses.field(default_factory=dict)
    outputs: Mapping[str, Connectivity] = dataclasses.field(default_factory=dict)
    failures: int = 0
    identity: str = ""
    unrendered: Mapping[str, str] = dataclasses.field(default_factory=dict)
    visualized: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    judgements: Mapping[tuple[str, str], Sequence[Judgement]] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, PixelKernels] = dataclasses.field(default_factory=dict)
    depths: Sequence[str] = ()
    network_layers: Sequence[Layer] = ()
    dataflow: Dataflow | None = None
    dataset_pass: str = ""
    displays: Mapping[str, str] = dataclasses.field(default_factory=dict)
    effects: EffectsResult | None = None
    activation_atlases: Mapping[str, AtlasResult] = dataclasses.field(default_factory=dict)
    facets: Mapping[str, FacetsResult] = dataclasses.field(default_factory=dict)


def read_identity(path: Path) -> str | None:
    """Return the digest of everything that an atlas was made from, or None if there is no readable atlas."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return hdf5.text_attribute(file, "identity")
    except (OSError, KeyError):
        return None


def precisions(shard: Shard) -> list[str]:
    """Return the floating-point types that the visualizations of a shard were optimized in.

    A group of an atlas can have several, if the workers of a cluster differed. Shards of former versions lack the
    attribute, and are float32.
    """
    return shard.attributes.get("precision", "float32").split()


def render_groups(path: Path) -> dict[tuple[str, str], Shard]:
    """Return the visualizations in an atlas as shards, by (layer, digest); empty if there is no readable atlas.

    Only attributes are read. Groups without digests of their images are left out.
    """
    groups: dict[tuple[str, str], Shard] = {}
    try:
        with h5py.File(path, "r", locking=False) as file:
            if structure.links(file):  # they would be followed, also into other files
                return {}
            for layer in hdf5.group(file, "layers").values():
                for group in layer["render"].values() if "render" in layer else ():
                    if "images_sha256" in group:
                        attributes = hdf5.all_attributes(group)
                        groups[hdf5.text_attribute(layer, "name"), attributes["digest"]] = Shard(
                            path, attributes, group.name
                        )
    except (OSError, KeyError, RuntimeError, AttributeError, TypeError, ValueError):
        return {}
    return groups


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that determine the result."""
    installed = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "unknown"
    return installed


def consolidate(path: Path, content: Content, rendered: Mapping[tuple[str, str], Sequence[Shard]]) -> None:
    """Write an atlas; an existing file at `path` is replaced at the end.

    A channel without a finished visualization gets a black image, the status `missing` and NaN measurements.

    Args:
        path: The file `atlas.h5`.
        content: Everything except the visualizations.
        rendered: Shards of visualizations by (layer, preset); presets keep the order of this mapping.

    Raises:
        Damaged: If a shard cannot be read completely, or an image does not match its digest.
        AtlasError: If the disk is full.
    """
    with hdf5.create_file(path) as file:
        _write_root(file, content)
        for order, (layer, channels) in enumerate(content.layers):
            group = file.create_group(f"layers/{safe_name(layer.name)}")
            _write_layer_attributes(group, layer, order, content.input_size)
            write_array(group, "channels", np.array(channels, np.int32))
            if layer.name in content.unrendered:
                group.attrs["unrendered"] = content.unrendered[layer.name]
            if layer.name in content.visualized:
                write_array(group, "visualized", np.isin(channels, content.visualized[layer.name]))
            if layer.name in content.kernels:
                kernels = content.kernels[layer.name]
                write_array(group, "kernel", kernels.kernel)
                group["kernel"].attrs["exact"] = kernels.exact
            for side, connectivity in (("inputs", content.inputs), ("outputs", content.outputs)):
                if layer.name in connectivity:
                    write_wiring(group, side, channels, connectivity[layer.name])
            for (name, preset), preset_shards in rendered.items():
                if name == layer.name and preset_shards:
                    _write_visualizations(group, preset, channels, preset_shards)
                    if preset in content.displays:
                        target = hdf5.group(group, f"render/{safe_name(preset)}")
                        target.attrs[DISPLAY_OF] = content.displays[preset]
                    for judgement in content.judgements.get((name, preset), ()):
                        _write_judgement(hdf5.group(group, f"render/{safe_name(preset)}"), judgement)
        if content.photos:
            _write_image_list(file, content.photos)
        layers = [layer for layer, _ in content.layers]
        groups = [hdf5.group(file, f"layers/{safe_name(layer.name)}") for layer in layers]
        if content.examples is not None:
            _write_dataset(file, content.examples)
            _write_pass_results(groups, layers, content.examples)
        if content.effects is not None:
            write_effects(file, content.effects)
            write_attributed(file, content.effects.connections)
        for name, result in content.activation_atlases.items():
            write_activation_atlas(hdf5.group(file, f"layers/{safe_name(name)}"), result)
        for name, found in content.facets.items():
            write_facets(hdf5.group(file, f"layers/{safe_name(name)}"), found)
        start = 0
        for i, (group, layer) in enumerate(zip(groups, layers, strict=True)):
            _write_relations(group, layer, content, i, slice(start, start + layer.channels))
            start += layer.channels


def _write_image_list(file: h5py.File, photos: Sequence[DatasetImage]) -> None:
    """Write paths, labels, sources and credits of all dataset images."""
    images = ImageTable.of(photos)
    names, numbers = images.labels
    write_array(file, "dataset/path", np.array(list(images.paths()), object))
    write_array(file, "dataset/label", np.array([*names, ""], object)[numbers])  # −1 is the last of them
    write_array(file, "dataset/source", images.sources)
    credits = credits_of(images.paths())
    if credits:
        write_array(file, "dataset/credits", np.array(credits, object))


def _write_root(file: h5py.File, content: Content) -> None:
    file.attrs["schema"] = SCHEMA
    file.attrs["schema_version"] = SCHEMA_VERSION
    file.attrs["run"] = content.run
    file.attrs["model"] = content.model
    file.attrs["weights_sha256"] = content.weights
    file.attrs["dataset_fingerprint"] = content.dataset_fingerprint
    file.attrs["versions"] = json.dumps(versions(), sort_keys=True)
    file.attrs["created"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    file.attrs["failures"] = content.failures
    file.attrs["identity"] = content.identity
    file.attrs["dataset_pass"] = content.dataset_pass
    file.create_dataset("provenance/config", data=published(content.config_yaml), dtype=h5py.string_dtype())
    if content.labels:
        write_array(file, "model/labels", np.array(content.labels, object))
    if content.depths:
        write_array(file, "model/depths", np.array(content.depths, object))
    for key in NETWORK_LAYER_ARRAYS if content.network_layers else ():
        values = [getattr(layer, key) for layer in content.network_layers]
        array = np.array(values, object if isinstance(values[0], str) else np.int32)
        write_array(file, f"model/layers/{key}", array)
    if content.network_layers and content.dataflow is not None:
        write_array(file, "model/layers/source", np.array(content.dataflow.sources, np.int32))
        pairs = [(join, node) for join, nodes in enumerate(content.dataflow.joins) for node in nodes]
        write_array(file, "model/joins", np.array(pairs, np.int32).reshape(-1, 2))


def _write_layer_attributes(group: h5py.Group, layer: Layer, order: int, input_size: tuple[int, int]) -> None:
    field = layer.field
    group.attrs["name"] = layer.name
    group.attrs["order"] = order
    group.attrs["kind"] = layer.kind
    group.attrs["channels"] = layer.channels
    group.attrs["map_height"] = layer.height
    group.attrs["map_width"] = layer.width
    group.attrs["receptive_field"] = np.array(field.size if field else (0, 0), np.int32)
    group.attrs["receptive_field_stride"] = np.array(field.stride if field else (0, 0), np.int32)
    group.attrs["receptive_field_offset"] = np.array(field.offset if field else (0, 0), np.int32)
    group.attrs["input_size"] = np.array(input_size, np.int32)
    if isinstance(layer, DictionaryLayer):
        group.attrs["dictionary"] = json.dumps(layer.description, sort_keys=True)


def _write_visualizations(
    group: h5py.Group, preset: str, channels: Sequence[int], preset_shards: Sequence[Shard]
) -> None:
    """Merge the shards of one layer and preset into `render/<preset>`; the first shard with a channel provides it."""
    with preset_shards[0].opened() as source:
        image_shape = hdf5.dataset(source, "images").shape[1:]
        lengths = {name: hdf5.dataset(source, name).shape[-1] for name in ("trace", "budget_value") if name in source}
    path, path_length = stored_path(preset_shards)
    target = _create_render_group(group, preset, preset_shards)
    images = hdf5.create_images(target, "images", (len(channels), *image_shape))
    masks = _create_masks(target, preset_shards, images.shape[:-1])
    size = (len(channels), image_shape[0])
    arrays = _missing_measurements(size, lengths)
    long_rows = {
        "response": _Rows(target, "response", (*size, hdf5.integer_attribute(group, "channels")[0])),
        "path_means": _Rows(target, "path_means", (*size, path_length)),
    }
    digests = np.zeros((*size, 32), np.uint8)
    target_row = {channel: i for i, channel in enumerate(channels)}
    optional = {*(metric.name for metric in IMAGE_METRICS), "budget_value"}
    stored: set[str] = set()
    filled: set[int] = set()
    for shard in preset_shards:
        with shard.opened() as source:
            rows = [(i, j) for i, j in finished_rows(shard, target_row) if j not in filled]
            filled |= {j for _, j in rows}
            for name, array in arrays.items():
                if name in optional and name not in source:
                    continue
                stored.add(name)
                values = hdf5.read_array(source, name)
                for i, j in rows:
                    array[j] = values[i]
            for name, long in long_rows.items():
                of_other_depths = name == "path_means" and path_layers(shard.attributes) != path
                if name in source and not of_other_depths:
                    long.set(rows, hdf5.read_array(source, name))
            source_digests = hdf5.read_array(source, "images_sha256")
            source_images = hdf5.dataset(source, "images")
            for i, j in rows:
                digests[j] = source_digests[i]
                # Reading decodes the chunks and checks their checksums; they are then copied as they are.
                if not np.array_equal(hdf5.image_digests(source_images[i : i + 1])[0], source_digests[i]):
                    raise DamagedShardError(shard, f"the image of channel {channels[j]} does not match its digest")
                _copy_chunks(source_images, i, images, j)
                if masks is not None and "mask" in source:
                    source_masks = hdf5.dataset(source, "mask")
                    source_masks[i]  # for the checksums
                    _copy_chunks(source_masks, i, masks, j)
    for name, array in arrays.items():
        if name in stored:
            write_array(target, name, array)
    if {name for name, long in long_rows.items() if long.write()} & {"path_means"}:
        target.attrs[PATH_LAYERS] = list(path)
    write_array(target, "images_sha256", digests)


def _write_judgement(group: h5py.Group, judgement: Judgement) -> None:
    """Write what a judge says about the visualizations of a group `render/<preset>`, as `judges/<name>`."""
    target = group.create_group(f"judges/{safe_name(judgement.judge)}")
    target.attrs["judge"] = judgement.judge
    target.attrs["weights_sha256"] = judgement.weights
    target.attrs["kind"] = judgement.kind
    for name, values in judgement.numbers.items():
        write_array(target, name, values)


def _create_render_group(group: h5py.Group, preset: str, preset_shards: Sequence[Shard]) -> h5py.Group:
    target = group.create_group(f"render/{safe_name(preset)}")
    for key, value in preset_shards[0].attributes.items():
        if key not in shards.FILE_ATTRIBUTES:
            target.attrs[key] = value
    target.attrs["order"] = len(hdf5.group(group, "render")) - 1
    target.attrs["preset"] = preset  # a shard can come from another preset with equal settings
    for name in ("device", "requested_precision"):
        values = {str(shard.attributes[name]) for shard in preset_shards if name in shard.attributes}
        if values:
            target.attrs[name] = " ".join(sorted(values))
    restarts = [shard.attributes["restart"] for shard in preset_shards if "restart" in shard.attributes]
    if restarts:
        target.attrs["restart"] = restarts[0]
    target.attrs["precision"] = " ".join(sorted({name for shard in preset_shards for name in precisions(shard)}))
    for key in ("level", "level_reason"):
        target.attrs[key] = _distinct(preset_shards, key)
    return target


def _distinct(preset_shards: Sequence[Shard], key: str) -> str:
    """Return the distinct values of an attribute, sorted and joined; shards of former versions may lack it."""
    values = {line for shard in preset_shards for line in str(shard.attributes.get(key, "")).split(SEPARATOR)}
    return SEPARATOR.join(sorted(values - {""}))


def _missing_measurements(size: tuple[int, int], lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return the measurements of missing visualizations.

    Shards of former versions lack `IMAGE_METRICS`: these are NaN for their channels, and not written at all if no shard
    has them. The same holds for `budget_value` and presets without budgets, and for `_Rows`.

    Args:
        size: (C', V).
        lengths: Length of the last axis of `trace` and, for presets with budgets, of `budget_value`.
    """

    def missing(metrics: Sequence[Metric]) -> dict[str, np.ndarray]:
        return {metric.name: np.full(size, metric.missing, metric.dtype) for metric in metrics}

    return {
        "status": np.full(size, "missing", object),
        "reason": np.full(size, "", object),
        **missing(RENDER_METRICS),
        **{name: np.full((*size, length), np.nan, np.float32) for name, length in lengths.items()},
        **missing(IMAGE_METRICS),
    }


class _Rows:
    """An array with a long last axis, (C', V, n) float16, of which the rows of some units arrive one after the other.

    Where few of many units have visualizations, as of a dictionary, only their rows are held and stored; the others are
    NaN by the fill value of the array.

    Args:
        target: Group of the visualizations.
        name: Name of the array.
        shape: (C', V, n).
    """

    def __init__(self, target: h5py.Group, name: str, shape: tuple[int, int, int]) -> None:
        self._target, self._name, self._shape = target, name, shape
        self._rows: dict[int, np.ndarray] = {}

    def set(self, rows: Sequence[tuple[int, int]], values: np.ndarray) -> None:
        """Set the rows (i, j): row j of the atlas is `values[i]`."""
        self._rows |= {j: values[i] for i, j in rows}

    def write(self) -> bool:
        """Write the array and return whether there is any row; without, nothing is written."""
        if not self._rows or not self._shape[2]:
            return False
        if 2 * len(self._rows) >= self._shape[0]:
            array = np.full(self._shape, np.nan, np.float16)
            for j, row in self._rows.items():
                array[j] = row
            write_array(self._target, self._name, array)
            return True
        chunks = (1, *self._shape[1:])
        options: dict[str, Any] = {"chunks": chunks, "compression": "gzip", "fletcher32": True, "fillvalue": np.nan}
        dataset = self._target.create_dataset(self._name, self._shape, np.float16, **options)
        for j, row in sorted(self._rows.items()):
            dataset[j] = row
        return True


def finished_rows(shard: Shard, target_row: Mapping[int, int]) -> list[tuple[int, int]]:
    """Return (row in the shard, row in the atlas) of each channel of which no variant is missing."""
    arrays = shard.get("channels", "status")
    finished = (arrays["status"] != "missing").all(-1)
    return [
        (i, target_row[channel])
        for i, channel in enumerate(arrays["channels"].tolist())
        if channel in target_row and finished[i]
    ]


def _create_masks(target: h5py.Group, preset_shards: Sequence[Shard], shape: tuple[int, ...]) -> h5py.Dataset | None:
    """Create the transparency masks, (C', V, H, W) uint8; None if no shard has any, as in former versions."""
    for shard in preset_shards:
        with shard.opened() as source:
            if "mask" in source:
                return hdf5.create_masks(target, "mask", shape)
    return None


def _copy_chunks(source: h5py.Dataset, i: int, target: h5py.Dataset, j: int) -> None:
    """Copy all variants of row `i` to row `j` as compressed chunks, with their checksums.

    A chunk that was never written stays so: a mask of a visualization that was made before there were masks.
    """
    for v in range(source.shape[1]):
        at, to = ((row, v, *(0,) * (source.ndim - 2)) for row in (i, j))
        if source.id.get_chunk_info_by_coord(at).byte_offset is not None:
            filter_mask, chunk = source.id.read_direct_chunk(at)
            target.id.write_direct_chunk(to, chunk, filter_mask)


def _write_depth_agreement(target: h5py.Group, content: Content, rows: np.ndarray | slice) -> None:
    """Write how similar the visualizations of the units in `rows` are in a layer that the preset does not optimize."""
    widths = {layer.name: layer.channels for layer in content.network_layers}
    optimized = compared_layers(content.config_yaml, hdf5.text_attribute(target, "preset"))
    name, means = depth_means(target, widths, optimized, rows)
    found = metrics.agreement(torch.from_numpy(means)).numpy() if name else np.full(means.shape[:2], np.nan, np.float32)
    _write_rows(target, rows, "depth_agreement", found)
    target["depth_agreement"].attrs["layer"] = name


def compared_layers(config: str, preset: str) -> set[str]:
    """Return the layers that the batch terms of a preset name, from a stored configuration (YAML)."""
    tree = stored_settings(config)
    found = [tree.get("render"), *(also.values() if isinstance(also := tree.get("also"), Mapping) else ())]
    named = [one for one in found if isinstance(one, Mapping) and one.get("name") == preset]
    terms = [term for one in named if isinstance(one.get("couplings"), Mapping) for term in one["couplings"].values()]
    return {str(term["layer"]) for term in terms if isinstance(term, Mapping) and term.get("layer")}


def _write_relations(group: h5py.Group, layer: Layer, content: Content, i: int, columns: slice) -> None:
    """Write the metrics of `RELATION_METRICS`, which compare visualizations with each other and with dataset images.

    The layer has number `i` and the `columns` of the dataset pass.
    """
    pass_result = content.examples
    channels = torch.from_numpy(hdf5.read_array(group, "channels").astype(np.int64))
    unrelated = not_of_activations()
    for target in hdf5.group(group, "render").values() if "render" in group else ():
        if "response" not in target:
            continue
        rows = _visualized_rows(target)
        activations = torch.from_numpy(hdf5.dataset(target, "response")[rows].astype(np.float32))
        spread = functools.partial(_write_rows, target, rows)
        spread("agreement", metrics.agreement(activations).numpy())
        _write_depth_agreement(target, content, rows)
        if pass_result is None or not len(pass_result.first_pass.responses):
            continue
        for column, name in enumerate(("contrast", "chroma")):
            if name in target:
                sample = pass_result.first_pass.appearance[:, column]
                quantile = metrics.quantile_among(hdf5.read_array(target, name), sample)
                write_array(target, f"{name}_quantile", quantile)
        if hdf5.text_attribute(target, "objective") in unrelated:
            continue  # the dataset examples of a unit are those with its highest activations
        negative = is_minimized(hdf5.text_attribute(target, "natural"))
        examples = compared_examples(hdf5.text_attribute(target, "objective"), negative)
        top = pass_result.examples[i].top(negative)[rows]
        natural = torch.from_numpy(pass_result.first_pass.responses[:, columns])
        for name, values in _transfer(activations, channels[rows], natural, (top, i, pass_result)).items():
            spread(name, values)
        for name, values in path_relations(target, PathUnits(layer, i, channels, examples, rows), pass_result).items():
            spread(name, values)
        if not negative:  # the stored activations are maxima
            spread("margin", metrics.margin(activations, channels[rows], natural).numpy())


def _visualized_rows(target: h5py.Group) -> np.ndarray | slice:
    """Return the rows of the units with visualizations if they are few of many, else all."""
    missing = (hdf5.read_array(target, "status") == "missing").any(-1)
    return np.flatnonzero(~missing) if 2 * missing.sum() > len(missing) else slice(None)


def _write_rows(target: h5py.Group, rows: np.ndarray | slice, name: str, values: np.ndarray) -> None:
    """Write an array of all units, of which `values` are some rows; the others are NaN."""
    if not isinstance(rows, slice):
        complete = np.full((len(hdf5.dataset(target, "status")), *values.shape[1:]), np.nan, values.dtype)
        complete[rows] = values
        values = complete
    write_array(target, name, values)


def _transfer(
    activations: Tensor, channels: Tensor, natural: Tensor, examples: tuple[np.ndarray, int, DatasetPassResult]
) -> dict[str, np.ndarray]:
    """Return the transfer of visualizations, its ceiling and its floor, by name; see `metrics.transfer`.

    Args:
        activations: (G, V, C).
        channels: (G,).
        natural: (n, C).
        examples: The best dataset images of each unit, (G, k), the number of the layer, and the dataset pass.
    """
    top, number, pass_result = examples
    index, answers = (pass_result.localizations[f"{number}/{name}"] for name in ("top", "answer"))
    step = max(1, TRANSFER_VALUES // max(1, top.shape[1] * answers.shape[1]))
    parts = []
    for start in range(0, max(1, len(top)), step):
        part = slice(start, start + step)
        of_examples = torch.from_numpy(metrics.example_activations(top[part], index, answers))
        parts.append(metrics.transfer(activations[part], channels[part], of_examples, natural))
    names = {"transfer": "value", "transfer_ceiling": "ceiling", "transfer_floor": "floor"}
    return {name: torch.cat([getattr(part, key) for part in parts]).numpy() for name, key in names.items()}


def _write_dataset(file: h5py.File, pass_result: DatasetPassResult) -> None:
    """Write what all layers share: the labels, the images shown as examples, the images of `responses`."""
    if pass_result.labels:
        write_array(file, "dataset/labels", np.array(pass_result.labels, object))
    write_array(file, "dataset/responses", pass_result.first_pass.responses_index)
    if pass_result.device:
        file["dataset"].attrs["device"] = pass_result.device
    group = file.create_group("dataset/shown")
    group.attrs["store"] = pass_result.store
    for name in ("index", "size", "box"):
        if f"shown/{name}" in pass_result.localizations:
            write_array(group, name, pass_result.localizations[f"shown/{name}"])
    if "shown/jpeg" in pass_result.localizations:
        write_jpegs(group, pass_result.localizations["shown/offset"], pass_result.localizations.pieces("shown/jpeg"))


def _write_pass_results(groups: Sequence[h5py.Group], layers: Sequence[Layer], pass_result: DatasetPassResult) -> None:
    """Write the results of the dataset pass for each layer's channels."""
    tally, ranges = pass_result.first_pass.tally, pass_result.ranges
    rectified = np.repeat([layer.rectified for layer in layers], [layer.channels for layer in layers])
    stats = channel_statistics(tally, ranges, rectified)
    sparsity_sums = tally.crowd / 2.0**32  # accumulated as integers, in units of 2⁻³²
    start = 0
    for i, (group, layer, examples) in enumerate(zip(groups, layers, pass_result.examples, strict=True)):
        columns = start + examples.channels
        start += layer.channels
        for key, array in stats.items():
            write_array(group, f"stats/{key}", array[columns])
        write_array(group, "layer_mean", stats["mean"][start - layer.channels : start])
        active_images = int(tally.crowded[i]) if layer.rectified else 0
        group["stats"].attrs["reference"] = "zero" if layer.rectified else "none"
        group["stats"].attrs["population_sparsity"] = sparsity_sums[i] / active_images if active_images else np.nan
        group["stats"].attrs["images"] = tally.images
        if isinstance(layer, DictionaryLayer):
            group["stats"].attrs["never_active"] = int((tally.max[start - layer.channels : start] <= 0).sum())
        group["stats"].attrs["rotation_number"] = _rotation_number(layers, i, pass_result.first_pass.means)
        write_array(group, "histogram/counts", tally.histogram[columns])
        write_array(group, "histogram/range", np.stack([ranges.low[columns], ranges.high[columns]], 1))
        write_array(group, "histogram/ends", np.stack([tally.peak_least[columns], tally.max[columns]], 1))
        write_array(group, "responses", pass_result.first_pass.responses[:, columns].T.astype(np.float16))
        _write_examples(group, i, examples, pass_result)
        association = pass_result.associations[i]
        if association is not None:
            for key, array in association.arrays().items():
                write_array(group, f"labels/{key}", array)
            group["labels"].attrs["method"] = association.method


def _rotation_number(layers: Sequence[Layer], i: int, means: np.ndarray) -> float:
    """Return the rotation number of layer number `i`, from means (n, C) of all channels of all layers side by side.

    That of latents is NaN unless the layer that they are computed from is one of the layers.
    """
    layer, ends = layers[i], np.cumsum([layer.channels for layer in layers])
    seed = seed_of("rotation", layer.name)
    if not isinstance(layer, DictionaryLayer):
        return rotation_number(means[:, ends[i] - layer.channels : ends[i]], seed)
    assert layer.base is not None and layer.dictionary is not None
    base = next((number for number, other in enumerate(layers) if other.name == layer.base.name), None)
    if base is None:
        return float("nan")
    columns = means[:, ends[base] - layers[base].channels : ends[base]]
    return rotation_number(columns, seed, layer.dictionary.encoder)


def _write_examples(group: h5py.Group, i: int, examples: TopExamples, pass_result: DatasetPassResult) -> None:
    """Write the example lists of layer number `i`, and its heat maps.

    A pair of image and channel has one heat map, whatever the number of its lists.
    """
    pairs, places = pass_result.localizations[f"{i}/pairs"], pass_result.localizations[f"{i}/place"]
    width = len(examples.channels)
    pair_keys = pairs[:, 0].astype(np.int64) * width + pairs[:, 1]
    for name, (value, index) in examples.lists.items():
        row = np.broadcast_to(np.arange(width)[:, None], index.shape)
        keys = index.astype(np.int64) * width + row
        position = np.searchsorted(pair_keys, keys)
        localized = (index >= 0) & (position < len(pair_keys))
        localized[localized] = pair_keys[position[localized]] == keys[localized]
        pair = np.where(localized, position, -1).astype(np.int32)
        place = np.zeros((*index.shape, 4), np.int16)  # y and x of the maximum, y and x of the minimum
        place[localized] = places[position[localized]]
        first = 2 if name == "min" else 0
        arrays = {"value": value, "index": index, "y": place[..., first], "x": place[..., first + 1], "map": pair}
        for key, array in arrays.items():
            write_array(group, f"examples/{name}/{key}", array)
    if "spectrum" in examples.lists:
        group["examples/spectrum"].attrs["edges"] = np.array(pass_result.edges, np.float64)
    write_array(group, "examples/maps/value", pass_result.localizations[f"{i}/map"])
    write_array(group, "examples/maps/range", pass_result.localizations[f"{i}/range"])
    if f"{i}/jpeg" in pass_result.localizations:
        pieces = pass_result.localizations.pieces(f"{i}/jpeg")
        write_jpegs(hdf5.group(group, "examples/maps"), pass_result.localizations[f"{i}/offset"], pieces)


def verify(path: Path, planned: Mapping[str, Sequence[int]]) -> list[tuple[str, str]]:
    """Return the faults of an atlas as (place, description); empty if it is intact.

    Checks the schema, reads every dataset (a damaged chunk fails its checksum), compares the units with `planned`,
    and checks that measurements are within their ranges.

    Args:
        path: The file `atlas.h5`.
        planned: Channels that the atlas should have, by layer; may be empty.
    """
    try:
        atlas = open_atlas(path)
    except AtlasError as error:
        return [(path.name, str(error))]
    faults = structural_faults(path)
    if faults:
        atlas.close()
        return faults
    with atlas, h5py.File(path, "r", locking=False) as file:
        unreadable = [name for name in hdf5.dataset_names(file) if not _is_readable(hdf5.dataset(file, name))]
        if unreadable:
            fault = "can't be read; `atlas repair` keeps everything else, `atlas run` makes the rest again"
            return [(name, fault) for name in unreadable]
        faults += [(name, "planned, but not in the atlas") for name in planned if name not in atlas.layers]
        dataset_images = len(atlas.dataset())
        for layer in atlas:
            absent = sorted(set(planned.get(layer.name, ())) - set(map(int, layer.channels)))
            if absent:
                faults.append((layer.name, f"{len(absent)} planned channels are not in the atlas, e.g. {absent[:3]}"))
            try:
                faults += _layer_faults(layer, planned.get(layer.name, ()) if planned else None, dataset_images)
                group = hdf5.group(file, f"layers/{safe_name(layer.name)}")
                faults += [(layer.name, fault) for fault in activation_atlas_faults(group, dataset_images)]
                faults += [(layer.name, fault) for fault in facets_faults(group, dataset_images)]
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                faults.append((layer.name, f"is not as docs/store.md describes it: {first_line(error)}"))
    return faults


def _layer_faults(layer: LayerView, planned: Sequence[int] | None, dataset_images: int) -> list[tuple[str, str]]:
    """Return the faults of a layer, of whose channels `planned` should have visualizations; None for all."""
    faults: list[tuple[str, str]] = []
    for preset in (*layer.presets, *layer.displays.values()):
        faults += [(f"{layer.name}/{preset}", fault) for fault in _measurement_faults(layer, preset, planned)]
        faults += [(f"{layer.name}/{preset}", fault) for fault in _judgement_faults(layer, preset)]
    if planned and not layer.presets:
        faults.append((layer.name, "has no feature visualizations; `atlas run` or `atlas render` makes them"))
    best = layer.examples("max")
    if best is not None and dataset_images and best.index.size and int(best.index.max()) >= dataset_images:
        faults.append((layer.name, "the index of an example is beyond the end of the dataset"))
    return faults


def _measurement_faults(layer: LayerView, preset: str, planned: Sequence[int] | None) -> Iterator[str]:
    numbers = layer.measurements(preset)
    expected = np.ones(len(layer.channels), bool) if planned is None else np.isin(layer.channels, planned)
    missing = int(((numbers["status"] == "missing").any(-1) & expected).sum())
    if missing and preset in layer.presets:
        yield f"{missing} feature visualizations are missing; `atlas run` makes them"
    succeeded = (numbers["status"] != "missing") & (numbers["status"] != "failed")
    if not np.isfinite(numbers["activation"][succeeded]).all():
        yield "an activation is not finite"
    for metric in METRICS:
        yield from _range_faults(metric.name, numbers.get(metric.name, np.zeros(0)), metric.low, metric.high)


def _judgement_faults(layer: LayerView, preset: str) -> Iterator[str]:
    for judgement in layer.judgements(preset):
        for name, values in judgement.numbers.items():
            yield from _range_faults(f"{name} in {judgement.judge}", values, *RANGES[name])


def _range_faults(what: str, values: np.ndarray, low: float, high: float) -> Iterator[str]:
    if (values < low - 1e-3).any() or (values > high + 1e-3).any():
        yield f"{what} is not between {low:g} and {high:g}"


def _is_readable(dataset: h5py.Dataset) -> bool:
    """Return whether the whole dataset can be read; it is read in blocks of rows of at most `READ_BYTES`."""
    try:
        if dataset.ndim == 0 or not dataset.size:
            dataset[()]
            return True
        row_bytes = int(dataset.dtype.itemsize * dataset.size / dataset.shape[0])
        rows = max(1, READ_BYTES // max(1, row_bytes))
        for start in range(0, dataset.shape[0], rows):
            dataset[start : start + rows]
    except (OSError, RuntimeError, ValueError, TypeError):
        return False
    return True
