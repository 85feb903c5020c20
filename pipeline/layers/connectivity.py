"""Which units of one layer feed which of another, and how strongly: the *expanded weights* of circuits.

Where one layer feeds another directly, through normalisation, activation, pooling and the like only, the weight
between two channels is a small kernel; its L2 norm says how strongly they are wired, the sign of its sum whether one
excites or inhibits the other. After Cammarata et al. 2020, "Thread: Circuits", and Voss et al. 2021, "Visualizing
Weights". A depthwise convolution that is no layer of its own is multiplied through; non-linearities are passed over,
so numbers of different layers are not to be compared.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.layers.finding import Layer
from pipeline.layers.tracing import Call, Trace, kind_of
from pipeline.models.loading import Model

# What may lie between two layers without mixing channels.
BETWEEN = ("norm", "activation", "pool", "dropout", "dropout1d", "dropout2d", "flatten", "identity", "droppath")
KEPT = 8


@dataclasses.dataclass(frozen=True)
class Connectivity:
    """For each channel of a layer the `KEPT` channels of `layer` that it is wired to most, strongest first.

    `channel` (C, k) int32, −1 where there are fewer; `norm` and `sum` (C, k) float32 of the kernels between them.
    """

    layer: str
    channel: np.ndarray
    norm: np.ndarray
    sum: np.ndarray


def wires(model: Model, layers: Sequence[Layer]) -> tuple[dict[str, Connectivity], dict[str, Connectivity]]:
    """(inputs, outputs) by layer name, for those of `layers` that another one of them feeds or that feed another.

    Where a layer feeds several, the first of them counts.
    """
    trace = Trace(model)
    known = {layer.name: layer for layer in layers if layer.kind in ("conv", "linear")}
    made = _producers(trace)
    inputs: dict[str, Connectivity] = {}
    outputs: dict[str, Connectivity] = {}
    for call in trace.calls:
        name = call.name
        if name not in known or not call.inputs:
            continue
        found = _source(trace, made, call, known)
        if found is None:
            continue
        source, through = found
        kernels = expanded(trace.modules[call.path], known[source].channels)
        if kernels is None:
            continue
        norm, total = (part * through for part in kernels)
        inputs[name] = _strongest(source, norm, total)
        outputs.setdefault(source, _strongest(name, norm.T, total.T))
    return inputs, outputs


def expanded(module: nn.Module, channels: int) -> tuple[np.ndarray, np.ndarray] | None:
    """(L2 norm, sum) of the kernel between each output and each of `channels` input channels, (O, I) float32 each.

    Groups that do not meet are zero. None for weights that are not those of a convolution or linear layer, or whose
    inputs are no whole number of places of each channel.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2 or getattr(module, "transposed", False):
        return None
    held = weight.detach().float().cpu().flatten(2) if weight.dim() > 2 else weight.detach().float().cpu()[..., None]
    groups = int(getattr(module, "groups", 1))
    outs, each = held.shape[:2]
    if groups == 1 and each != channels and each % channels == 0:
        held = held.reshape(outs, channels, -1)  # maps that were flattened, channel by channel
        each = channels
    if each * groups != channels:
        return None
    norm, total = torch.zeros(outs, channels), torch.zeros(outs, channels)
    for group in range(groups):
        rows = slice(group * outs // groups, (group + 1) * outs // groups)
        columns = slice(group * each, (group + 1) * each)
        norm[rows, columns] = held[rows].norm(dim=2)
        total[rows, columns] = held[rows].sum(dim=2)
    return norm.numpy(), total.numpy()


def _producers(trace: Trace) -> dict[int, Call]:
    """The call that each tensor came out of: the outermost that does not mix channels, or a convolution or the like."""
    made: dict[int, Call] = {}
    for call in trace.calls:
        # A module that hands on what it was given produced nothing.
        if call.output not in call.inputs and kind_of(trace.modules[call.path]) in (*BETWEEN, "conv", "linear"):
            made[call.output] = call
    return made


def _source(trace: Trace, made: dict[int, Call], call: Call, known: dict[str, Layer]) -> tuple[str, np.ndarray] | None:
    """The layer that feeds `call`, and what depthwise convolutions on the way make of each of its channels."""
    through: np.ndarray = np.ones(1, np.float32)
    seen = made.get(call.inputs[0])
    while seen is not None:
        module = trace.modules[seen.path]
        if seen.name in known:
            return seen.name, through
        if kind_of(module) in ("conv", "linear"):
            channels = int(getattr(module, "groups", 0))
            weight = getattr(module, "weight", None)
            if channels < 2 or not isinstance(weight, Tensor) or len(weight) != channels:
                return None
            through = through * weight.detach().float().cpu().flatten(1).norm(dim=1).numpy()
        seen = made.get(seen.inputs[0]) if seen.inputs else None
    return None


def _strongest(layer: str, norm: np.ndarray, total: np.ndarray) -> Connectivity:
    count = min(KEPT, norm.shape[1])
    order = np.argsort(-norm, axis=1, kind="stable")[:, :count]
    strength = np.take_along_axis(norm, order, 1)
    channel = np.where(strength > 0, order, -1).astype(np.int32)
    return Connectivity(
        layer, channel, strength.astype(np.float32), np.take_along_axis(total, order, 1).astype(np.float32)
    )
