"""Effective connectivity: how strongly the channels of one layer act on those of the next.

Where one layer feeds another through channel-wise modules only (normalization, activation, pooling), the weights
between two channels form a small kernel. The kernel is *effective*: it leads from the values of one layer to those of
the other as both are measured, and a convolution is measured after its own normalization. So it contains

- the scale γ / √(σ² + ε) of each normalization between the two, among them the reading layer's own, but not the source
  layer's own, which is in its values already (Ioffe & Szegedy 2015, algorithm 2);
- the depthwise convolutions between them that are not themselves in the list of layers. Norms are multiplied by norms
  and sums by sums; the product of sums is the sum of the combined kernel, the product of norms approximates its norm.

The L2 norm of the kernel is the weight of the connection, and the sign of its sum is negative where one channel
inhibits the other. Connections are ranked by their *strength*: the norm times the standard deviation of the source
channel over the dataset, so that a channel that hardly varies counts little. See Cammarata et al. 2020, "Thread:
Circuits", and Voss et al. 2021, "Visualizing Weights".

Non-linearities are ignored, so strengths of different layers are not comparable.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.layers.circuits.kernels import DirectKernels
from pipeline.layers.connections import Connectivity, Scale, strongest
from pipeline.layers.finding import Layer
from pipeline.layers.tracing import CONVS, Call, Trace, class_of, kind_of
from pipeline.models.loading import Model

# Kinds of modules (`kind_of`) that do not mix channels.
CHANNELWISE = (
    "norm",
    "activation",
    "pool",
    "dropout",
    "dropout1d",
    "dropout2d",
    "flatten",
    "identity",
    "droppath",
)
# Normalizations with a weight γ for each channel; the first ones can have running statistics.
RUNNING_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
SCALED_NORMS = (*RUNNING_NORMS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# Convolutions and linear layers that apply `weight` as it is; Conv2dSame of timm differs from Conv2d by its padding.
PLAIN_FORWARDS = frozenset(cls.forward for cls in (*CONVS, nn.Linear))
PLAIN_CLASSES = ("Conv2dSame",)

_NONE = np.zeros((0, 0), np.int32)


@dataclasses.dataclass(frozen=True)
class _Link:
    """What is between a convolution or linear layer and the layer that feeds it.

    Attributes:
        source: Name of the layer that feeds it.
        gain: Scale of each input by normalizations, (I,) or (I · H · W,) for flattened maps, or (1,) for none.
        norm: Product of the norms of the depthwise kernels, (I,) or (1,).
        sum: Product of their sums, (I,) or (1,).
        approximate: See `Connectivity`.
        depthwise: Paths of the depthwise convolutions, the nearest to the reading layer first.
    """

    source: str
    gain: np.ndarray
    norm: np.ndarray
    sum: np.ndarray
    approximate: tuple[str, ...]
    depthwise: tuple[str, ...]


def find_connectivity(
    model: Model, layers: Sequence[Layer], deviations: Mapping[str, np.ndarray] | None = None
) -> tuple[dict[str, Connectivity], dict[str, Connectivity]]:
    """Return the connections between layers that feed each other directly.

    Args:
        model: The network; its normalizations must not be folded.
        layers: The layers between which connections are searched; only convolutions and linear layers count.
        deviations: Standard deviation of each channel over the dataset, (C,), by layer name; None without a dataset
            pass. Channels without a finite one count as channels that never vary.

    Returns:
        Two dictionaries by layer name: connections to the channels that a layer reads, and to the channels that read
        it. A layer without such a neighbor is missing. Where a layer feeds several, the first one counts.
    """
    trace = Trace(model)
    weighted = {layer.name: layer for layer in layers if layer.kind in ("conv", "linear")}
    producers = _producers(trace)
    inputs: dict[str, Connectivity] = {}
    outputs: dict[str, Connectivity] = {}
    for call in trace.calls:
        name = call.name
        if name not in weighted or not call.inputs:
            continue
        link = _link(trace, producers, call, weighted)
        kernels = None if link is None else _effective_weights(trace, call, weighted, link)
        if link is None or kernels is None:
            continue
        norm, total, approximate, direct = kernels
        deviation = (deviations or {}).get(link.source)
        strength = norm if deviation is None else norm * np.nan_to_num(deviation, nan=0.0, posinf=0.0)
        scale: Scale = "1" if deviation is None else "sd"
        between = link.depthwise[::-1]
        reading = strongest(Connectivity(link.source, _NONE, norm, total, strength, scale, approximate, path=between))
        inputs[name] = dataclasses.replace(reading, kernel=_kernels_of(direct, reading, reads=True))
        if link.source not in outputs:
            read = strongest(Connectivity(name, _NONE, norm.T, total.T, strength.T, scale, approximate, path=between))
            outputs[link.source] = dataclasses.replace(read, kernel=_kernels_of(direct, read, reads=False))
    return inputs, outputs


def _kernels_of(kernels: DirectKernels, found: Connectivity, reads: bool) -> np.ndarray | None:
    """Return the kernels of the connections of each channel, (C, k, h, w) float16; zeros where there is none.

    Args:
        kernels: Kernels between the two layers.
        found: Connections of each channel.
        reads: Whether these channels are those that read.
    """
    own = np.broadcast_to(np.arange(len(found.channel))[:, None], found.channel.shape)
    other = np.maximum(found.channel, 0)
    values = kernels.of(own, other) if reads else kernels.of(other, own)
    return None if values is None else values * (found.channel >= 0)[..., None, None]


def expanded_weights(
    module: nn.Module, channels: int, gain: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the L2 norm and the sum of the kernel between each output and each input channel.

    Args:
        module: A convolution or linear layer. A linear layer may read flattened maps (I × H × W).
        channels: Number of input channels, I.
        gain: Factor of each input, (I,) or (I · H · W,) for flattened maps, or (1,); None for 1.

    Returns:
        Norms and sums, (O, I) float32 each; zero between channels of different groups. None for other modules,
        transposed convolutions, weights whose number of inputs is not `channels` (of a linear layer: a multiple of
        it), and gains of another number of inputs.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or getattr(module, "transposed", False):
        return None
    kernels = weight.detach().float().cpu()
    kernels = kernels.flatten(2) if weight.dim() > 2 else kernels[..., None]
    groups = int(getattr(module, "groups", 1))
    num_outputs, per_group = kernels.shape[:2]
    if weight.dim() == 2 and per_group != channels and per_group % channels == 0:
        kernels = kernels.reshape(num_outputs, channels, -1)  # inputs are flattened maps, channel by channel
        per_group = channels
    factors = torch.ones(1) if gain is None else torch.from_numpy(gain)
    factors = factors.expand(channels) if len(factors) == 1 else factors
    if per_group * groups != channels or len(factors) not in (channels, channels * kernels.shape[2]):
        return None
    factors = factors.reshape(channels, -1)
    norm, total = torch.zeros(num_outputs, channels), torch.zeros(num_outputs, channels)
    for group in range(groups):
        rows = slice(group * num_outputs // groups, (group + 1) * num_outputs // groups)
        columns = slice(group * per_group, (group + 1) * per_group)
        scaled = kernels[rows] * factors[columns]
        norm[rows, columns] = scaled.norm(dim=2)
        total[rows, columns] = scaled.sum(dim=2)
    return norm.numpy(), total.numpy()


def normalization_gain(module: nn.Module) -> tuple[np.ndarray | None, bool]:
    """Return the factor by which a normalization multiplies each channel.

    Args:
        module: A module of the kind "norm", in inference mode.

    Returns:
        The factor, (C,) float32, or None if the module has none for each channel; and whether it is all that the
        module multiplies by. It is γ / √(σ² + ε) where σ² are running statistics. Where statistics are those of the
        image, the factor is γ, and not all.
    """
    cls = class_of(module)
    weight, mean, variance, epsilon = (
        getattr(module, name, None) for name in ("weight", "running_mean", "running_var", "eps")
    )
    # The frozen batch normalizations of torchvision and timm are classes of their own.
    is_running = issubclass(cls, RUNNING_NORMS) or "batchnorm" in cls.__name__.lower()
    if is_running and isinstance(mean, Tensor) and isinstance(variance, Tensor):
        gain = None
        if isinstance(epsilon, float):
            gain = (variance + epsilon).rsqrt()
            gain = gain * weight if isinstance(weight, Tensor) else gain
        elif cls is not type(module):  # in an exported program ε is an argument of an operator
            base = mean.detach().reshape(1, -1, 1, 1)
            gain = (module(base + 1) - module(base)).flatten()
        if gain is not None:
            return gain.detach().float().cpu().numpy(), True
    if issubclass(cls, SCALED_NORMS) and isinstance(weight, Tensor) and weight.dim() == 1:
        return weight.detach().float().cpu().numpy(), False
    return None, False


def _effective_weights(
    trace: Trace, call: Call, weighted: Mapping[str, Layer], link: _Link
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], DirectKernels] | None:
    """Return norms (O, I), sums (O, I), approximate modules and kernels from `link.source` to the call's layer.

    None if the weights do not match the channels of the source.
    """
    module, source = trace.modules[call.path], weighted[link.source]
    weights = expanded_weights(module, source.channels, link.gain)
    if weights is None:
        return None
    approximate = link.approximate if _applies_plain_weight(module) else (*link.approximate, call.path)
    norm, total = weights[0] * link.norm, weights[1] * link.sum
    own, factor = _own_normalization(weighted[call.name]), np.ones(1, np.float32)
    if own is not None:
        gain, exact = normalization_gain(trace.modules[own[0]])
        if gain is not None and len(gain) == len(norm):
            norm, total, factor = norm * np.abs(gain)[:, None], total * gain[:, None], gain
        else:
            exact = False
        approximate = approximate if exact else (*approximate, own[0])
    depthwise = [trace.modules[path] for path in link.depthwise]
    size = (source.height, source.width)
    return norm, total, approximate, DirectKernels(module, link.gain, factor, depthwise, source.channels, size)


def _applies_plain_weight(module: nn.Module) -> bool:
    """Return whether a convolution or linear layer multiplies by its `weight`, not by a function of it."""
    return class_of(module).forward in PLAIN_FORWARDS or class_of(module).__name__ in PLAIN_CLASSES


def _own_normalization(layer: Layer) -> tuple[str, int] | None:
    """Return path and call of the normalization after which a layer is read; None if it is read at its own output."""
    # Inside a module that fuses normalization and activation, the layer is read at the input of `act`.
    path = layer.module.removesuffix(".act") if layer.side == "in" else layer.module
    return None if path == layer.name.partition("#")[0] else (path, layer.call)


def _producers(trace: Trace) -> dict[int, Call]:
    """Return for each tensor the outermost call of a channel-wise module, convolution or linear layer that made it."""
    producers: dict[int, Call] = {}
    for call in trace.calls:
        # A module that returns one of its inputs did not compute it.
        if call.output in call.inputs:
            continue
        module = trace.modules[call.path]
        kind = kind_of(module)
        # Blocks such as torchvision's Conv2dNormActivation are named like a normalization, but mix channels.
        if kind in ("conv", "linear") or (kind in CHANNELWISE and not _contains_weights(module)):
            producers[call.output] = call
    return producers


def _contains_weights(module: nn.Module) -> bool:
    return any(kind_of(child) in ("conv", "linear") for child in module.modules())


def _link(trace: Trace, producers: Mapping[int, Call], call: Call, weighted: Mapping[str, Layer]) -> _Link | None:
    """Return the layer that feeds `call`, and what is between; None if channels are mixed before any layer."""
    gain = norm = total = np.ones(1, np.float32)
    approximate: list[str] = []
    depthwise: list[str] = []
    calls = list(_upstream(producers, call))
    names = [producer.name for producer in calls]
    end = next((i for i, name in enumerate(names) if name in weighted), None)
    if end is None:
        return None
    own = _own_normalization(weighted[names[end]])
    for producer in calls[:end]:
        module = trace.modules[producer.path]
        if kind_of(module) in ("conv", "linear"):
            kernels = _depthwise_kernels(module)
            if kernels is None:
                return None
            depthwise.append(producer.path)
            norm, total = norm * np.linalg.norm(kernels, axis=1), total * kernels.sum(1)
            if not _applies_plain_weight(module):
                approximate.append(producer.path)
        elif kind_of(module) == "norm" and producer.key != own:
            factor, exact = normalization_gain(module)
            combined = None if factor is None else _multiply(gain, factor)
            gain = gain if combined is None else combined
            if combined is None or not exact:
                approximate.append(producer.path)
    return _Link(names[end], gain, norm, total, tuple(approximate), tuple(depthwise))


def _upstream(producers: Mapping[int, Call], call: Call) -> Iterator[Call]:
    """Yield the calls that made the first input of `call`, the nearest first."""
    producer = producers.get(call.inputs[0])
    while producer is not None:
        yield producer
        producer = producers.get(producer.inputs[0]) if producer.inputs else None


def _depthwise_kernels(module: nn.Module) -> np.ndarray | None:
    """Return the kernels of a depthwise convolution, (C, k) float32; None if the module mixes channels."""
    groups = int(getattr(module, "groups", 0))
    weight = getattr(module, "weight", None)
    if groups < 2 or not isinstance(weight, Tensor) or len(weight) != groups:
        return None
    return weight.detach().float().cpu().flatten(1).numpy()


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """Multiply factors of channels with factors of channels or of flattened maps; None if the lengths do not match."""
    length = max(len(a), len(b))
    if length % len(a) or length % len(b):
        return None
    return np.repeat(a, length // len(a)) * np.repeat(b, length // len(b))
