"""Connections of all layers of an atlas: of direct neighbours, and along linear paths to the layer before."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.core.errors import first_line
from pipeline.kernels.device_errors import is_device_failure
from pipeline.layers.circuits.kernels import cropped
from pipeline.layers.circuits.paths import LinearPath, Weights
from pipeline.layers.connections import NUM_CONNECTIONS, Connectivity, Scale
from pipeline.layers.connectivity import find_connectivity
from pipeline.layers.dictionaries import KIND, channel_layers, dictionary_layers
from pipeline.layers.finding import Layer
from pipeline.models.loading import Model

log = logging.getLogger(__name__)

# Kinds of layers that linear paths begin and end at.
KINDS = ("conv", "linear", "block", KIND)
# How many of the layers before a layer are tried as its source; in parallel branches the nearest ones do not feed it.
TRIED = 6


def find_circuits(
    model: Model,
    layers: Sequence[tuple[Layer, Sequence[int]]],
    deviations: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, Connectivity], dict[str, Connectivity]]:
    """Return the connections between the layers of an atlas.

    Layers that feed each other through channel-wise modules have those of `find_connectivity`. Any other layer has
    those along the linear path from the nearest layer before it that reaches it. Latents of a dictionary read the
    nearest layer before theirs, of latents if there is one, by their encoder; they are read, by their decoder, by the
    nearest layer after theirs. Layers of channels have no connections from latents: these stand for their own channels.

    Args:
        model: The network, on a CPU; its normalizations must not be folded.
        layers: Layers with their channels in the atlas, in the order of computation.
        deviations: Standard deviation of each channel over the dataset, (C,), by layer name; None without a dataset
            pass.

    Returns:
        Two dictionaries by layer name: connections to the channels that a layer reads, and to the channels that read
        it. Along linear paths, channels that are not in the atlas have no connections to what they read, and are not
        among the channels that read a layer.
    """
    inputs, outputs = find_connectivity(model, [layer for layer, _ in layers], deviations)
    for number, (target, channels) in enumerate(layers):
        if target.name in inputs or target.kind not in KINDS or not channels:
            continue
        before = _candidates([layer for layer, _ in layers[:number]], target)
        path, source = _nearest(model, before[::-1], target)
        if path is None or source is None:
            continue
        found = _collected(path, source, (target, channels), deviations)
        inputs[target.name] = found.inputs()
        outputs.setdefault(source.name, found.outputs())
    for source in dictionary_layers([layer for layer, _ in layers if layer.name not in outputs]):
        target, path = _reader(model, source, layers)
        if path is not None and target is not None:
            outputs[source.name] = _collected(path, source, target, deviations).outputs()
    return inputs, outputs


def _candidates(before: Sequence[Layer], target: Layer) -> list[Layer]:
    """Return the layers before a layer that are tried as what it reads, in their order."""
    if target.kind != KIND:
        before = channel_layers(before)
    others = [layer for layer in before if layer.place != target.place]
    return [layer for layer in others[-TRIED:] if layer.kind in KINDS]


def _reader(
    model: Model, source: Layer, layers: Sequence[tuple[Layer, Sequence[int]]]
) -> tuple[tuple[Layer, Sequence[int]] | None, LinearPath | None]:
    """Return the nearest layer of channels after a layer of latents that reads them, and the linear path to it."""
    names = [layer.name for layer, _ in layers]
    after = [
        (layer, channels)
        for layer, channels in layers[names.index(source.name) + 1 :]
        if layer.kind in KINDS and layer.kind != KIND and channels and layer.place != source.place
    ]
    for layer, channels in after[:TRIED]:
        path, _ = _nearest(model, [source], layer)
        if path is not None:
            return (layer, channels), path
    return None, None


def _collected(
    path: LinearPath,
    source: Layer,
    target: tuple[Layer, Sequence[int]],
    deviations: Mapping[str, np.ndarray] | None,
) -> "_Collector":
    """Return the strongest connections along a linear path to some channels of the target."""
    found = _Collector(path, source, target[0], (deviations or {}).get(source.name))
    for part, weights in path.weights(target[1]):
        found.add(part, weights)
    return found


def _nearest(model: Model, before: Sequence[Layer], target: Layer) -> tuple[LinearPath | None, Layer | None]:
    """Return the linear path to a layer from the first of some layers that reaches it."""
    for source in before:
        try:
            path = LinearPath(model, source, target)
        except Exception as error:  # whatever the code of a network raises for tensors that need gradients
            if is_device_failure(error):
                raise
            log.info("No linear path from %s to %s: %s", source.name, target.name, first_line(error))
            continue
        if path.connected and path.mixes:
            return path, source
    return None, None


class _Collector:
    """Keeps the strongest connections of each channel while effective weights of target channels arrive."""

    def __init__(self, path: LinearPath, source: Layer, target: Layer, deviation: np.ndarray | None) -> None:
        self._path, self._source, self._target = path, source, target
        self._scale: Scale = "1" if deviation is None else "sd"
        known = np.ones(source.channels) if deviation is None else deviation
        self._deviation = np.nan_to_num(np.asarray(known, np.float32), nan=0.0, posinf=0.0)
        self._inputs: _Table | None = None
        self._outputs: _Table | None = None

    def add(self, channels: Sequence[int], weights: Weights) -> None:
        """Add the weights of some target channels."""
        strength = weights.norm * self._deviation
        sources = np.broadcast_to(np.arange(self._source.channels), strength.shape)
        targets = np.broadcast_to(np.array(channels)[:, None], strength.shape)
        residual = np.zeros_like(strength) if weights.residual is None else weights.residual
        kernel = cropped(weights.kernel)
        rows = _Table(strength, sources, weights.norm, weights.sum, residual, kernel).strongest()
        if self._inputs is None:
            self._inputs = _Table.empty(self._target.channels, rows)
        self._inputs.set(channels, rows)
        columns = _Table(strength.T, targets.T, weights.norm.T, weights.sum.T, residual.T, kernel.swapaxes(0, 1))
        former = self._outputs
        self._outputs = (columns if former is None else former.joined(columns)).strongest()

    def inputs(self) -> Connectivity:
        """Return the connections of the target to what it reads."""
        assert self._inputs is not None
        return self._connectivity(self._source.name, self._inputs)

    def outputs(self) -> Connectivity:
        """Return the connections of the source to what reads it."""
        assert self._outputs is not None
        return self._connectivity(self._target.name, self._outputs)

    def _connectivity(self, layer: str, table: "_Table") -> Connectivity:
        path = self._path
        return Connectivity(
            layer,
            np.where(table.strength > 0, table.channel, -1).astype(np.int32),
            table.norm.astype(np.float32),
            table.sum.astype(np.float32),
            table.strength.astype(np.float32),
            self._scale,
            path.approximate,
            kernel=table.kernel,
            path=path.path,
            bypassed=path.bypassed,
            gated=path.gated,
            linearized=True,
            residual=table.residual.astype(np.float32) if path.has_residual else None,
        )


@dataclasses.dataclass(frozen=True)
class _Table:
    """Candidate connections of channels, (C, n) each; `kernel` (C, n, h, w)."""

    strength: np.ndarray
    channel: np.ndarray
    norm: np.ndarray
    sum: np.ndarray
    residual: np.ndarray
    kernel: np.ndarray

    @classmethod
    def empty(cls, count: int, like: "_Table") -> "_Table":
        """Return a table of zeros for so many channels, with as many connections each as another table."""
        return cls(*(np.zeros((count, *array.shape[1:]), array.dtype) for array in like.arrays))

    @property
    def arrays(self) -> list[np.ndarray]:
        """All arrays, in the order of the fields."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def set(self, channels: Sequence[int], rows: "_Table") -> None:
        """Set the rows of some channels."""
        for array, values in zip(self.arrays, rows.arrays, strict=True):
            array[list(channels)] = values

    def joined(self, other: "_Table") -> "_Table":
        """Return the candidates of both tables."""
        return _Table(*(np.concatenate(pair, 1) for pair in zip(self.arrays, other.arrays, strict=True)))

    def strongest(self) -> "_Table":
        """Return the strongest candidates of each channel, strongest first."""
        order = np.argsort(-self.strength, axis=1, kind="stable")[:, :NUM_CONNECTIONS]
        return _Table(
            *(np.take_along_axis(a, order.reshape(*order.shape, *[1] * (a.ndim - 2)), 1) for a in self.arrays)
        )
