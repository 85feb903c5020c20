"""Connections between units in `atlas.h5`: effective weights with their kernels, and attributions over the dataset."""

import dataclasses
from collections.abc import Mapping, Sequence

import h5py
import numpy as np

from pipeline.effects.results import ConnectionAttribution
from pipeline.layers.connections import NUM_CONNECTIONS, Connectivity
from pipeline.store import hdf5
from pipeline.store.hdf5 import write_array
from pipeline.store.shards import safe_name

# Separates several values in one attribute.
SEPARATOR = "\n"
SIDES = ("inputs", "outputs")
# Attributes with lists of module paths.
LISTS = ("approximate", "path", "bypassed", "gated")


@dataclasses.dataclass(frozen=True)
class Wiring:
    """The most strongly connected units in another layer of the atlas, for each unit; strongest first.

    Attributes:
        layer: Name of the other layer.
        channel: Channels of that layer, (C', k); −1 where there are fewer than k.
        norm: Norms of the effective weights between the two units, (C', k).
        sum: Sums of the effective weights between the two units, (C', k); negative where one unit inhibits the other.
        strength: Norms times the scale of the source unit, (C', k); what connections are ranked by.
        scale: The scale: "sd" for the standard deviation over the dataset, "1" for none. "" in atlases of former
            versions, whose weights leave out normalizations; their strengths are the norms.
        approximate: Paths of modules that are in the weights only in part; see `layers.connections.Connectivity`.
        kernel: The effective weights as small kernels, cropped to their middle, (C', k, h, w) float16; None if they are
            no images, and in older atlases.
        path: Paths of the convolutions and linear layers that lie between the two layers.
        bypassed: Those of `path` that a residual path or a parallel branch goes around.
        gated: Paths of the activation functions between that are replaced by their mean gates.
        linearized: Whether the weights are those of a linear path through other layers (`circuits.paths.LinearPath`);
            False for layers that feed each other directly, and in older atlases.
        residual: Sums of the weights along the paths around all of `bypassed`, (C', k); None without such paths.
        attribution: Attribution of the connections over dataset images, (C', k), NaN where it was not measured; see
            `Attributed`. None without.
    """

    layer: str
    channel: np.ndarray
    norm: np.ndarray
    sum: np.ndarray
    strength: np.ndarray
    scale: str = ""
    approximate: tuple[str, ...] = ()
    kernel: np.ndarray | None = None
    path: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()
    gated: tuple[str, ...] = ()
    linearized: bool = False
    residual: np.ndarray | None = None
    attribution: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Attributed:
    """The connections of each unit with the largest attributions in absolute value over dataset images, largest first.

    Attributes:
        layer: Name of the other layer.
        channel: Channels of that layer, (C', k) int32; −1 where there are fewer than k.
        value: Attributions, (C', k) float32; see `pipeline.effects.connections`.
        images: Number of dataset images.
    """

    layer: str
    channel: np.ndarray
    value: np.ndarray
    images: int


def write_wiring(group: h5py.Group, side: str, channels: Sequence[int], connectivity: Connectivity) -> None:
    """Write the connections of the units of a layer into its group."""
    rows = np.array(channels, int)
    for key in ("channel", "norm", "sum", "strength", "kernel", "residual"):
        values = getattr(connectivity, key)
        if values is not None:
            write_array(group, f"wiring/{side}/{key}", values[rows])
    attributes = group[f"wiring/{side}"].attrs
    attributes["layer"] = connectivity.layer
    attributes["scale"] = connectivity.scale
    attributes["linearized"] = connectivity.linearized
    for key in LISTS:
        attributes[key] = SEPARATOR.join(getattr(connectivity, key))


def read_wiring(layer: h5py.Group, side: str) -> Wiring | None:
    """Return the connections in the group of a layer; None if there are none."""
    if f"wiring/{side}" not in layer:
        return None
    group = hdf5.group(layer, f"wiring/{side}")
    attributes = hdf5.all_attributes(group)

    def optional(name: str) -> np.ndarray | None:
        return hdf5.read_array(group, name) if name in group else None

    norm = hdf5.read_array(group, "norm")
    strength = optional("strength")
    return Wiring(
        attributes["layer"],
        hdf5.read_array(group, "channel"),
        norm,
        hdf5.read_array(group, "sum"),
        norm if strength is None else strength,
        attributes.get("scale", ""),
        kernel=optional("kernel"),
        linearized=bool(attributes.get("linearized", False)),
        residual=optional("residual"),
        attribution=optional("attribution"),
        **{key: tuple(filter(None, str(attributes.get(key, "")).split(SEPARATOR))) for key in LISTS},
    )


def write_attributed(file: h5py.File, connections: Mapping[str, ConnectionAttribution]) -> None:
    """Write attributions of connections, by the name of the target; wiring and channels are written already."""
    done: set[str] = set()
    for target, found in connections.items():
        group, before = (hdf5.group(file, f"layers/{safe_name(name)}") for name in (target, found.source))
        channels, sources = hdf5.read_array(group, "channels"), hdf5.read_array(before, "channels")
        every = np.arange(found.value.shape[1])
        _write_side(group, "inputs", found.source, Pairs(found.value, every), found.images)
        if found.source not in done:  # as for weights, the first layer that reads it
            done.add(found.source)
            _write_side(before, "outputs", target, Pairs(found.value.T[sources], channels), found.images)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Attributions of units (rows) and units of another layer (columns), (C', n), whose channels are `channels`."""

    value: np.ndarray
    channels: np.ndarray


def _write_side(group: h5py.Group, side: str, other: str, pairs: Pairs, images: int) -> None:
    size = np.abs(np.nan_to_num(pairs.value))
    order = np.argsort(-size, axis=1, kind="stable")[:, :NUM_CONNECTIONS]
    channel = np.where(np.take_along_axis(size, order, 1) > 0, pairs.channels[order], -1)
    write_array(group, f"attributed/{side}/channel", channel.astype(np.int32))
    write_array(group, f"attributed/{side}/value", np.take_along_axis(pairs.value, order, 1).astype(np.float32))
    group[f"attributed/{side}"].attrs["layer"] = other
    group[f"attributed/{side}"].attrs["images"] = images
    wiring = read_wiring(group, side)
    if wiring is not None and wiring.layer == other:
        column = np.full(int(max(pairs.channels.max(initial=0), wiring.channel.max(initial=0))) + 1, -1)
        column[pairs.channels] = np.arange(len(pairs.channels))
        places = column[np.maximum(wiring.channel, 0)]
        aligned = np.take_along_axis(pairs.value, np.maximum(places, 0), 1)
        known = (wiring.channel >= 0) & (places >= 0)
        write_array(group, f"wiring/{side}/attribution", np.where(known, aligned, np.nan).astype(np.float32))


def read_attributed(layer: h5py.Group, side: str) -> Attributed | None:
    """Return the connections with the largest attributions in the group of a layer; None if there are none."""
    if f"attributed/{side}" not in layer:
        return None
    group = hdf5.group(layer, f"attributed/{side}")
    attributes = hdf5.all_attributes(group)
    return Attributed(
        attributes["layer"],
        hdf5.read_array(group, "channel"),
        hdf5.read_array(group, "value"),
        int(attributes["images"]),
    )
