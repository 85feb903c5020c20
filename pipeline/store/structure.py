"""The structure of an atlas.h5 that somebody else may have made, checked before anything of it is read.

HDF5 lets a small file name other files, and declare arrays that no memory holds. What reads an atlas relies on the
members, types and shapes that docs/store.md describes.
"""

from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from pipeline.store import hdf5

# A problem: the place in the file, and what is wrong there.
Fault = tuple[str, str]

# H5L_TYPE_HARD of the HDF5 library.
HARD_LINK = 0

# Deflate compresses to no less than a thousandth; what is below `SPARE` bytes is not worth a refusal.
MAX_RATIO, SPARE = 1100, 1 << 20

# Largest size of one chunk in bytes: an image is read as one chunk, and has at most 64 million pixels.
MAX_CHUNK = 3 * 64_000_000

# Arrays that are read image by image, each of which is a chunk; those of missing visualizations are not stored.
STACKS = ("images", "mask")

# Attributes and arrays that every layer has, and every preset of a layer, with the number of dimensions.
LAYER_ATTRIBUTES = {"name": "text", "kind": "text"} | dict.fromkeys(
    ("order", "channels", "map_height", "map_width"), "number"
)
LAYER_ARRAYS = {"channels": ("iu", 1)}
RENDER_ATTRIBUTES = {"preset": "text"}
RENDER_ARRAYS = {"images": ("u", 5), "activation": ("f", 2), "status": ("O", 2)}

# Arrays of a preset that may be absent, all (C', V, …); those of a layer, (C', …).
RENDER_OPTIONAL = {
    "mask": ("u", 4),
    "images_sha256": ("u", 3),
    "reason": ("O", 2),
    "trace": ("f", 3),
    "response": ("f", 3),
    "path_means": ("f", 3),
    "path_curve": ("f", 3),
    "budget_value": ("f", 3),
    **dict.fromkeys(("robust", "start", "seconds", "peak", "spatial_mean"), ("f", 2)),
    **dict.fromkeys(("seed", "steps"), ("iu", 2)),
}
LAYER_OPTIONAL = {"responses": ("f", 2), "kernel": ("f", 4), "visualized": ("b", 1)}


def faults(file: h5py.File) -> list[Fault]:
    """Return what an open atlas lacks, or has and must not have; empty if it can be read.

    No data is read, and no link to another place or file is followed.
    """
    result = links(file)
    if result:
        return result
    result = arrays(file)
    return result or list(_members(file))


def links(file: h5py.File) -> list[Fault]:
    """Return the links that are not hard links: h5py would follow them, also into other files."""
    result: list[Fault] = []

    def visit(name: bytes, info: Any) -> None:
        if info.type != HARD_LINK:
            result.append((name.decode("utf-8", "replace"), "is a link, which an atlas does not have"))

    file.id.links.visit(visit, info=True)
    return result


def arrays(file: h5py.File) -> list[Fault]:
    """Return arrays that are stored elsewhere, of a type that no array of an atlas has, or larger than they can be."""
    result: list[Fault] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            reason = _array_fault(name, item)
            if reason:
                result.append((name, reason))

    file.visititems(visit)
    return result


def _array_fault(name: str, array: h5py.Dataset) -> str:
    if array.is_virtual or array.external:
        return "lies in another file, which is not opened"
    if array.dtype.kind not in "iufbSU" and not h5py.check_string_dtype(array.dtype):
        return f"has the type {array.dtype}, which no array of an atlas has"
    if array.chunks is not None and int(np.prod(array.chunks, dtype=object)) * array.dtype.itemsize > MAX_CHUNK:
        return f"has chunks of {array.chunks} values, too large to be read"
    declared = int(np.prod(array.shape, dtype=object)) * array.dtype.itemsize if array.shape else 0
    in_chunks = name.rpartition("/")[2] in STACKS and array.chunks == (1, 1, *array.shape[2:])
    if not in_chunks and declared > MAX_RATIO * array.id.get_storage_size() + SPARE:
        return f"declares {declared:,} bytes, more than the file can hold"
    return ""


def _members(file: h5py.File) -> Iterator[Fault]:
    """Yield what layers and presets lack, and what has another type or shape than readers rely on."""
    parent = file.get("layers")
    if not isinstance(parent, h5py.Group):
        yield "layers", "is not there: the file holds no layers"
        return
    for name in parent:
        layer = parent[name]
        place = f"layers/{name}"
        if not isinstance(layer, h5py.Group):
            yield place, "is not a layer"
            continue
        before = list(_wrong(layer, place, LAYER_ATTRIBUTES, LAYER_ARRAYS, LAYER_OPTIONAL))
        yield from before
        if before:
            continue
        (count,) = hdf5.dataset(layer, "channels").shape
        if "responses" in layer and (rows := hdf5.dataset(layer, "responses").shape[0]) != count:
            yield f"{place}/responses", f"has {rows} rows for {count} channels"
        if "render" in layer:
            yield from _presets(layer["render"], f"{place}/render", count)


def _presets(parent: Any, place: str, count: int) -> Iterator[Fault]:
    if not isinstance(parent, h5py.Group):
        yield place, "is not a group of presets"
        return
    for name in parent:
        group = parent[name]
        if not isinstance(group, h5py.Group):
            yield f"{place}/{name}", "is not a preset"
            continue
        before = list(_wrong(group, f"{place}/{name}", RENDER_ATTRIBUTES, RENDER_ARRAYS, RENDER_OPTIONAL))
        yield from before
        if before:
            continue
        shape = hdf5.dataset(group, "images").shape[:2]
        for key in (*RENDER_ARRAYS, *RENDER_OPTIONAL):
            if key in group and (size := hdf5.dataset(group, key).shape[:2]) != shape:
                yield f"{place}/{name}/{key}", f"has {size} values beside {shape} images"
        if shape[0] != count:
            yield f"{place}/{name}/images", f"has {shape[0]} rows for {count} channels"


def _wrong(
    group: h5py.Group,
    place: str,
    attributes: dict[str, str],
    required: dict[str, tuple[str, int]],
    optional: dict[str, tuple[str, int]],
) -> Iterator[Fault]:
    """Yield required attributes and arrays that a group lacks, and arrays of a wrong type or dimension."""
    for name, kind in attributes.items():
        value = group.attrs.get(name)
        if value is None:
            yield place, f"has no attribute {name!r}"
        elif isinstance(value, str | bytes) != (kind == "text"):
            yield place, f"has the attribute {name!r} of another type"
    for name, (kinds, dimensions) in (required | optional).items():
        item = group.get(name)
        if item is None:
            if name in required:
                yield place, f"has no array {name!r}"
        elif not isinstance(item, h5py.Dataset) or item.dtype.kind not in kinds or item.ndim != dimensions:
            yield f"{place}/{name}", "has another type or shape than such an array has"
