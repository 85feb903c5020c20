"""`atlas.h5`: all shards of a run in one file, and what is wrong with such a file.

The schema (version 3) is described in docs/store.md. Pictures are copied chunk by chunk as they are
compressed; the file is made under a temporary name and renamed, so that a reader never meets half of one.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from pipeline.core.errors import AtlasError
from pipeline.core.metric_specs import MEASURES, RELATIONS
from pipeline.data.datasets import Photo
from pipeline.examples.channel_stats import statistics
from pipeline.examples.localize import TopExamples
from pipeline.examples.results import DatasetPassResult
from pipeline.layers.connectivity import Connectivity
from pipeline.layers.finding import Layer
from pipeline.store import shards
from pipeline.store.reader import SCHEMA, SCHEMA_VERSION, open_atlas
from pipeline.store.shards import Damaged, Shard, put, safe
from pipeline.visualization import metrics

LIBRARIES = ("neuron-atlas", "torch", "torchvision", "timm", "h5py", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class Content:
    """What goes into an atlas, beside the rendered shards.

    `unrendered` says by layer name why a layer has no visualizations, where that was known before any work.
    """

    run: str
    model: str
    weights: str
    config_yaml: str
    labels: tuple[str, ...]
    input_size: tuple[int, int]
    layers: Sequence[tuple[Layer, tuple[int, ...]]]
    photos: Sequence[Photo] = ()
    dataset_fingerprint: str = ""
    examples: DatasetPassResult | None = None
    inputs: Mapping[str, Connectivity] = dataclasses.field(default_factory=dict)
    outputs: Mapping[str, Connectivity] = dataclasses.field(default_factory=dict)
    failures: int = 0
    identity: str = ""
    unrendered: Mapping[str, str] = dataclasses.field(default_factory=dict)


def identity(path: Path) -> str | None:
    """The digest of all that an atlas was made from, or None if there is no readable atlas."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            return shards.text(file, "identity")
    except (OSError, KeyError):
        return None


def precisions(shard: Shard) -> list[str]:
    """What steps of its pictures were computed in; more than one only in an atlas, where a cluster's workers differed.

    Shards of former versions do not say, and are float32.
    """
    return shard.attributes.get("precision", "float32").split()


# What separates several values in an attribute; no cause of a fallback is more than one line.
SEPARATOR = "\n"


def _distinct(shards_: Sequence[Shard], key: str) -> str:
    """The different values of an attribute of shards, in order; shards of former versions may lack it."""
    values = {line for shard in shards_ for line in str(shard.attributes.get(key, "")).split(SEPARATOR)}
    return SEPARATOR.join(sorted(values - {""}))


def parts(path: Path) -> dict[tuple[str, str], Shard]:
    """What an atlas holds of each layer, by its name and digest, in the shape of shards; empty if there is none.

    Nothing but attributes is read. An atlas whose pictures bear no digests holds nothing in this sense.
    """
    found: dict[tuple[str, str], Shard] = {}
    try:
        with h5py.File(path, "r", locking=False) as file:
            for layer in shards.group(file, "layers").values():
                for target in layer["render"].values() if "render" in layer else ():
                    if "images_sha256" in target:
                        attributes = shards.plain(target)
                        found[shards.text(layer, "name"), attributes["digest"]] = Shard(path, attributes, target.name)
    except (OSError, KeyError, RuntimeError):
        return {}
    return found


def versions() -> dict[str, str]:
    """Versions of Python and the libraries that shape the result."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def consolidate(path: Path, content: Content, rendered: Mapping[tuple[str, str], Sequence[Shard]]) -> None:
    """Write `atlas.h5` from the shards by (layer, preset) and `content`; an old one is replaced at the end.

    Presets keep the order of `rendered`. A channel without a finished picture has a black one, status `missing` and
    NaN for numbers.
    """
    with shards.creating(path) as file:
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
        file.create_dataset("provenance/config", data=content.config_yaml, dtype=h5py.string_dtype())
        if content.labels:
            put(file, "model/labels", np.array(content.labels, object))
        for order, (layer, channels) in enumerate(content.layers):
            group = file.create_group(f"layers/{safe(layer.name)}")
            _describe(group, layer, order, content.input_size)
            put(group, "channels", np.array(channels, np.int32))
            if layer.name in content.unrendered:
                group.attrs["unrendered"] = content.unrendered[layer.name]
            for side, wires in (("inputs", content.inputs), ("outputs", content.outputs)):
                if layer.name in wires:
                    _wiring(group, side, channels, wires[layer.name])
            for (name, preset), found in rendered.items():
                if name == layer.name and found:
                    _pictures(group, preset, channels, found)
        if content.photos:
            put(file, "dataset/path", np.array([p.path for p in content.photos], object))
            put(file, "dataset/label", np.array([p.label for p in content.photos], object))
            put(file, "dataset/source", np.array([p.source for p in content.photos], np.int32))
        if content.examples is not None:
            _dataset(file, content.examples)
            groups = [shards.group(file, f"layers/{safe(layer.name)}") for layer, _ in content.layers]
            _surveyed(groups, [layer for layer, _ in content.layers], content.examples)
        start = 0
        for i, (layer, _) in enumerate(content.layers):
            group, end = shards.group(file, f"layers/{safe(layer.name)}"), start + layer.channels
            _related(group, content.examples, i, slice(start, end))
            start = end


def _describe(group: h5py.Group, layer: Layer, order: int, input_size: tuple[int, int]) -> None:
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


def _wiring(group: h5py.Group, side: str, channels: Sequence[int], wires: Connectivity) -> None:
    rows = np.array(channels, int)
    for key in ("channel", "norm", "sum"):
        put(group, f"wiring/{side}/{key}", getattr(wires, key)[rows])
    group[f"wiring/{side}"].attrs["layer"] = wires.layer


def _pictures(group: h5py.Group, preset: str, channels: Sequence[int], found: Sequence[Shard]) -> None:
    row = {channel: i for i, channel in enumerate(channels)}
    first = found[0]
    with first.opened() as source:
        shape = shards.dataset(source, "images").shape[1:]
        marks = shards.dataset(source, "trace").shape[-1]
    target = group.create_group(f"render/{safe(preset)}")
    for key, value in first.attributes.items():
        if key not in shards.OF_FILES:
            target.attrs[key] = value
    target.attrs["order"] = len(shards.group(group, "render")) - 1
    target.attrs["preset"] = preset  # equal settings under another name have made the same pictures
    target.attrs["precision"] = " ".join(sorted({name for shard in found for name in precisions(shard)}))
    for key in ("level", "level_reason"):
        target.attrs[key] = _distinct(found, key)
    images = shards.create_images(target, "images", (len(channels), *shape))
    size = (len(channels), shape[0])
    arrays: dict[str, np.ndarray] = {
        "status": np.full(size, "missing", object),
        "reason": np.full(size, "", object),
        "seed": np.full(size, -1, np.int64),
        "steps": np.zeros(size, np.int32),
        **{k: np.full(size, np.nan, np.float32) for k in ("activation", "robust", "start", "seconds")},
        "trace": np.full((*size, marks), np.nan, np.float32),
        # Shards of former versions have none of these: NaN then, and nothing at all where no shard has them.
        **{k: np.full(size, np.nan, np.float32) for k in MEASURES},
        "response": np.full((*size, shards.numbers(group, "channels")[0]), np.nan, np.float16),
    }
    held: set[str] = set()
    digests = np.zeros((*size, 32), np.uint8)
    filled: set[int] = set()
    for shard in found:
        with shard.opened() as source:
            small = shard.get("channels", "status")
            present = (small["status"] != "missing").all(-1)
            kept = [
                (i, row[c])
                for i, c in enumerate(small["channels"].tolist())
                if c in row and present[i] and row[c] not in filled
            ]
            filled |= {j for _, j in kept}
            for name, array in arrays.items():
                if name in (*MEASURES, "response") and name not in source:
                    continue
                held.add(name)
                values = shards.get(source, name)
                for i, j in kept:
                    array[j] = values[i]
            wanted = shards.get(source, "images_sha256")
            pictures = shards.dataset(source, "images")
            for i, j in kept:
                digests[j] = wanted[i]
                # Reading decodes and checks; the compressed chunk then goes over as it is, checksum included.
                if not np.array_equal(shards.picture_digests(pictures[i : i + 1])[0], wanted[i]):
                    raise Damaged(shard, f"channel {channels[j]} does not have its digest")
                for v in range(shape[0]):
                    mask, chunk = pictures.id.read_direct_chunk((i, v, 0, 0, 0))
                    images.id.write_direct_chunk((j, v, 0, 0, 0), chunk, mask)
    for name, array in arrays.items():
        if name in held:
            put(target, name, array)
    put(target, "images_sha256", digests)


def _related(group: h5py.Group, found: DatasetPassResult | None, i: int, at: slice) -> None:
    """What a layer's answers to its pictures say beside each other and beside those to photographs.

    The layer is number `i`; its channels are `at` among those of the dataset pass.
    """
    for target in shards.group(group, "render").values() if "render" in group else ():
        if "response" not in target:
            continue
        answers = torch.from_numpy(shards.get(target, "response").astype(np.float32))
        put(target, "agreement", metrics.agreement(answers).numpy())
        if found is None or not len(found.sweep.responses):
            continue
        top = found.chosen[i].top(shards.text(target, "natural") in ("least", "min"))
        natural = metrics.mean_answers(top, found.looks[f"{i}/top"], found.looks[f"{i}/answer"])
        usual = torch.from_numpy(found.sweep.responses[:, at].mean(0))
        put(target, "transfer", metrics.transfer(answers, torch.from_numpy(natural), usual).numpy())


def _dataset(file: h5py.File, found: DatasetPassResult) -> None:
    """What the photographs have in common: labels, the pictures shown, and whose responses are kept."""
    if found.labels:
        put(file, "dataset/labels", np.array(found.labels, object))
    put(file, "dataset/responses", found.sweep.responses_index)
    group = file.create_group("dataset/shown")
    group.attrs["store"] = found.store
    for name in ("index", "size", "box", "offset", "jpeg"):
        if (array := found.looks.get(f"shown/{name}")) is not None:
            _bytes(group, name, array)


def _bytes(group: h5py.Group, name: str, array: np.ndarray) -> None:
    """One dataset; JPEG bytes are compressed already, and the checksum still guards them."""
    if name == "jpeg" and array.size:
        group.create_dataset(name, data=array, chunks=True, fletcher32=True)
    else:
        put(group, name, array)


def _surveyed(groups: Sequence[h5py.Group], layers: Sequence[Layer], found: DatasetPassResult) -> None:
    """What the dataset pass says of each layer's channels."""
    numbers = statistics(found.sweep.tally, found.ranges)
    tally, crowd = found.sweep.tally, found.sweep.tally.crowd / 2.0**32
    start = 0
    for i, (group, layer, chosen) in enumerate(zip(groups, layers, found.chosen, strict=True)):
        at = start + chosen.channels
        start += layer.channels
        for key, array in numbers.items():
            put(group, f"stats/{key}", array[at])
        crowded = int(tally.crowded[i])
        group["stats"].attrs["population_sparsity"] = crowd[i] / crowded if crowded else np.nan
        group["stats"].attrs["images"] = tally.images
        put(group, "histogram/counts", tally.histogram[at])
        put(group, "histogram/range", np.stack([found.ranges.low[at], found.ranges.high[at]], 1))
        put(group, "histogram/ends", np.stack([tally.peak_least[at], tally.max[at]], 1))
        put(group, "responses", found.sweep.responses[:, at].T.astype(np.float16))
        _examples(group, i, chosen, found)
        association = found.associations[i]
        if association is not None:
            for key, array in association.arrays().items():
                put(group, f"labels/{key}", array)
            group["labels"].attrs["method"] = association.method


def _examples(group: h5py.Group, i: int, chosen: TopExamples, found: DatasetPassResult) -> None:
    """Lists, each entry with its place on the map and its row among the heat-maps, which are kept once a pair."""
    pairs, places = found.looks[f"{i}/pairs"], found.looks[f"{i}/place"]
    width = len(chosen.channels)
    keys = pairs[:, 0].astype(np.int64) * width + pairs[:, 1]
    for name, (value, index) in chosen.lists.items():
        row = np.broadcast_to(np.arange(width)[:, None], index.shape)
        wanted = index.astype(np.int64) * width + row
        at = np.searchsorted(keys, wanted)
        there = (index >= 0) & (at < len(keys))
        there[there] = keys[at[there]] == wanted[there]
        pair = np.where(there, at, -1).astype(np.int32)
        place = np.zeros((*index.shape, 4), np.int16)
        place[there] = places[at[there]]
        first = 2 if name == "min" else 0
        arrays = {"value": value, "index": index, "y": place[..., first], "x": place[..., first + 1], "map": pair}
        for key, array in arrays.items():
            put(group, f"examples/{name}/{key}", array)
    if "spectrum" in chosen.lists:
        group["examples/spectrum"].attrs["edges"] = np.array(found.edges, np.float64)
    put(group, "examples/maps/value", found.looks[f"{i}/map"])
    put(group, "examples/maps/range", found.looks[f"{i}/range"])
    if f"{i}/jpeg" in found.looks:
        for name in ("offset", "jpeg"):
            _bytes(shards.group(group, "examples/maps"), name, found.looks[f"{i}/{name}"])


def verify(path: Path, planned: Mapping[str, Sequence[int]]) -> list[tuple[str, str]]:
    """What is wrong with an atlas, as (where, what); empty if it is whole.

    Checks the schema, reads every dataset (a torn chunk fails its checksum), compares with `planned`
    (layer → channels), and holds numbers against what they must be.
    """
    wrong: list[tuple[str, str]] = []
    try:
        atlas = open_atlas(path)
    except AtlasError as error:
        return [(path.name, str(error))]
    with atlas, h5py.File(path, "r", locking=False) as file:

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                try:
                    _read_through(item)
                except OSError:
                    wrong.append(
                        (name, "can't be read; remove atlas.h5 and `atlas run` writes it again from the shards")
                    )

        file.visititems(visit)
        if wrong:
            return wrong
        photographs = len(atlas.dataset())
        for name in planned:
            if name not in atlas.layers:
                wrong.append((name, "planned, but not in the atlas"))
        for layer in atlas:
            lost = sorted(set(planned.get(layer.name, ())) - set(map(int, layer.channels)))
            if lost:
                wrong.append((layer.name, f"{len(lost)} planned channels are not in the atlas, e.g. {lost[:3]}"))
            for preset in layer.presets:
                numbers = layer.numbers(preset)
                missing = int((numbers["status"] == "missing").any(-1).sum())
                if missing:
                    wrong.append((f"{layer.name}/{preset}", f"{missing} pictures are missing; `atlas run` makes them"))
                finished = numbers["status"] != "missing"
                if not np.isfinite(numbers["activation"][finished & (numbers["status"] != "failed")]).all():
                    wrong.append((f"{layer.name}/{preset}", "an activation is not finite"))
                for name, (low, high) in (MEASURES | RELATIONS).items():
                    values = numbers.get(name, np.zeros(0))
                    if (values < low - 1e-3).any() or (values > high + 1e-3).any():
                        wrong.append((f"{layer.name}/{preset}", f"{name} is not between {low:g} and {high:g}"))
            if planned and not layer.presets:
                wrong.append((layer.name, "has no pictures; `atlas run` or `atlas render` makes them"))
            best = layer.examples("max")
            if best is not None and photographs and int(best.index.max()) >= photographs:
                wrong.append((layer.name, "an example points beyond the dataset"))
    return wrong


def _read_through(dataset: h5py.Dataset) -> None:
    if dataset.ndim == 0 or not dataset.size:
        dataset[()]
        return
    rows = max(1, (1 << 24) // max(1, int(dataset.dtype.itemsize * dataset.size / dataset.shape[0])))
    for start in range(0, dataset.shape[0], rows):
        dataset[start : start + rows]
