"""Expanded weights: how strongly the channels of one layer are connected to those of the next.

Where one layer feeds another through channel-wise modules only (normalization, activation, pooling), the weights
between two channels form a small kernel. The L2 norm of the kernel is the strength of the connection, and the sign of
its sum is negative where one channel inhibits the other. See Cammarata et al. 2020, "Thread: Circuits", and Voss et
al. 2021, "Visualizing Weights".

Kernels are multiplied by the norms of depthwise convolutions between the two layers that are not themselves in the
list of layers. Non-linearities are ignored, so strengths of different layers are not comparable.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.layers.finding import Layer
from pipeline.layers.tracing import Call, Trace, kind_of
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
# Number of connections that are stored for each channel.
NUM_CONNECTIONS = 8


@dataclasses.dataclass(frozen=True)
class Connectivity:
    """The strongest connections of each channel of one layer with the channels of another, strongest first.

    Attributes:
        layer: Name of the other layer.
        channel: Channels of the other layer, (C, k) int32 with k at most `NUM_CONNECTIONS`; -1 where the norm is 0.
        norm: L2 norms of the kernels, (C, k) float32.
        sum: Sums of the kernels, (C, k) float32.
    """

    layer: str
    channel: np.ndarray
    norm: np.ndarray
    sum: np.ndarray


def find_connectivity(model: Model, layers: Sequence[Layer]) -> tuple[dict[str, Connectivity], dict[str, Connectivity]]:
    """Return the connections between layers that feed each other directly.

    Args:
        model: The network.
        layers: The layers between which connections are searched; only convolutions and linear layers count.

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
        source_and_scale = _source(trace, producers, call, weighted)
        if source_and_scale is None:
            continue
        source, scale = source_and_scale
        weights = expanded_weights(trace.modules[call.path], weighted[source].channels)
        if weights is None:
            continue
        norm, total = weights[0] * scale, weights[1] * scale
        inputs[name] = _strongest(source, norm, total)
        outputs.setdefault(source, _strongest(name, norm.T, total.T))
    return inputs, outputs


def expanded_weights(module: nn.Module, channels: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the L2 norm and the sum of the kernel between each output and each input channel.

    Args:
        module: A convolution or linear layer. A linear layer may read flattened maps (C × H × W).
        channels: Number of input channels, I.

    Returns:
        Norms and sums, (O, I) float32 each; zero between channels of different groups. None for other modules,
        transposed convolutions, and weights whose number of inputs is not a multiple of `channels`.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or getattr(module, "transposed", False):
        return None
    kernels = weight.detach().float().cpu()
    kernels = kernels.flatten(2) if weight.dim() > 2 else kernels[..., None]
    groups = int(getattr(module, "groups", 1))
    num_outputs, per_group = kernels.shape[:2]
    if groups == 1 and per_group != channels and per_group % channels == 0:
        kernels = kernels.reshape(num_outputs, channels, -1)  # inputs are flattened maps, channel by channel
        per_group = channels
    if per_group * groups != channels:
        return None
    norm, total = torch.zeros(num_outputs, channels), torch.zeros(num_outputs, channels)
    for group in range(groups):
        rows = slice(group * num_outputs // groups, (group + 1) * num_outputs // groups)
        columns = slice(group * per_group, (group + 1) * per_group)
        norm[rows, columns] = kernels[rows].norm(dim=2)
        total[rows, columns] = kernels[rows].sum(dim=2)
    return norm.numpy(), total.numpy()


def _producers(trace: Trace) -> dict[int, Call]:
    """Return for each tensor the outermost call of a channel-wise module, convolution or linear layer that made it."""
    producers: dict[int, Call] = {}
    for call in trace.calls:
        # A module that returns one of its inputs did not compute it.
        if call.output in call.inputs:
            continue
        if kind_of(trace.modules[call.path]) in (*CHANNELWISE, "conv", "linear"):
            producers[call.output] = call
    return producers


def _source(
    trace: Trace, producers: Mapping[int, Call], call: Call, weighted: Mapping[str, Layer]
) -> tuple[str, np.ndarray] | None:
    """Return the layer that feeds `call`, and the factor for each of its channels by depthwise convolutions between."""
    scale: np.ndarray = np.ones(1, np.float32)
    producer = producers.get(call.inputs[0])
    while producer is not None:
        module = trace.modules[producer.path]
        if producer.name in weighted:
            return producer.name, scale
        if kind_of(module) in ("conv", "linear"):
            groups = int(getattr(module, "groups", 0))
            weight = getattr(module, "weight", None)
            if groups < 2 or not isinstance(weight, Tensor) or len(weight) != groups:
                return None  # not depthwise: channels are mixed
            scale = scale * weight.detach().float().cpu().flatten(1).norm(dim=1).numpy()
        producer = producers.get(producer.inputs[0]) if producer.inputs else None
    return None


def _strongest(layer: str, norm: np.ndarray, total: np.ndarray) -> Connectivity:
    """Select the largest norms of each row of (O, I) norms and sums."""
    count = min(NUM_CONNECTIONS, norm.shape[1])
    order = np.argsort(-norm, axis=1, kind="stable")[:, :count]
    strength = np.take_along_axis(norm, order, 1)
    channel = np.where(strength > 0, order, -1).astype(np.int32)
    return Connectivity(
        layer, channel, strength.astype(np.float32), np.take_along_axis(total, order, 1).astype(np.float32)
    )
