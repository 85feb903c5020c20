"""Kernels between single channels of two layers: those of convolutions, multiplied out and cropped."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

# Largest side of a stored kernel; larger ones are cropped to their middle.
KERNEL_SIDE = 9


@dataclasses.dataclass(frozen=True)
class DirectKernels:
    """Kernels from a layer to the one that reads it through channel-wise modules.

    Attributes:
        module: The convolution or linear layer that reads.
        gain: Factor of each input by normalizations, (I,) or (I · H · W,) for flattened maps, or (1,).
        own: Factor of each output by the reading layer's own normalization, (O,), or (1,).
        depthwise: The depthwise convolutions between, the nearest to the reading layer first.
        channels: Number of input channels, I.
        size: (height, width) of the maps of the source, for linear layers that read flattened maps.
    """

    module: nn.Module
    gain: np.ndarray
    own: np.ndarray
    depthwise: Sequence[nn.Module]
    channels: int
    size: tuple[int, int]

    def of(self, outputs: np.ndarray, inputs: np.ndarray) -> np.ndarray | None:
        """Return the kernels of pairs of an output and an input channel, (…) each, as (…, h, w) float16.

        None for weights that are no images, such as those of 1-D convolutions. Pooling between is left out.
        """
        weight = getattr(self.module, "weight", None)
        if not isinstance(weight, Tensor) or getattr(self.module, "transposed", False):
            return None
        targets, sources = outputs.flatten(), inputs.flatten()
        kernels = self._own_kernels(weight.detach().float().cpu(), targets, sources)
        if kernels is None:
            return None
        own = self.own if len(self.own) > 1 else np.broadcast_to(self.own, (len(weight),))
        kernels = kernels * torch.from_numpy(own[targets].copy())[:, None, None]
        kernels = dilated(kernels, _pair(self.module, "dilation"))
        for between in self.depthwise:
            small = between.get_parameter("weight").detach().float().cpu()
            if small.dim() != 4:
                return None
            kernels = through_depthwise(kernels, small[sources, 0], between)
        found = cropped(kernels.numpy())
        return found.reshape(*outputs.shape, *found.shape[1:])

    def _own_kernels(self, weight: Tensor, targets: np.ndarray, sources: np.ndarray) -> Tensor | None:
        """Return the kernels of the reading module for pairs of channels, (n, h, w), with the gain of its inputs."""
        height, width = self.size
        if weight.dim() == 2:
            positions = weight.shape[1] // self.channels
            if positions not in (1, height * width):
                return None
            shape = (1, 1) if positions == 1 else self.size
            table = weight.reshape(len(weight), self.channels, *shape)
        elif weight.dim() == 4:
            table, shape = weight, (1, 1)
        else:
            return None
        per_group = table.shape[1]
        kernels = table[targets, sources % per_group]
        gain = torch.from_numpy(self.gain)
        if len(gain) == 1:
            return kernels * gain
        gain = gain.reshape(self.channels, -1)[sources]
        return kernels * (gain.reshape(-1, *shape) if gain.shape[1] > 1 else gain[..., None])


def through_depthwise(kernels: Tensor, small: Tensor, module: nn.Module) -> Tensor:
    """Return the kernels of a depthwise convolution followed by other kernels, per pair.

    Args:
        kernels: The kernels that read the depthwise convolution, (n, h, w).
        small: Its own kernels, (n, k, k').
        module: The depthwise convolution, for its stride and dilation.

    Returns:
        (n, (h − 1) · stride + k, …) kernels in positions of its input.
    """
    count = len(kernels)
    small = dilated(small, _pair(module, "dilation"))
    # A transposed convolution adds a copy of `small` for each weight of `kernels`, `stride` positions apart.
    full = functional.conv_transpose2d(kernels[None], small[:, None], stride=_pair(module, "stride"), groups=count)
    return full[0]


def dilated(kernels: Tensor, dilation: tuple[int, int]) -> Tensor:
    """Return kernels (n, h, w) with zeros between the weights of a dilated convolution."""
    if dilation == (1, 1):
        return kernels
    n, h, w = kernels.shape
    spread = kernels.new_zeros(n, (h - 1) * dilation[0] + 1, (w - 1) * dilation[1] + 1)
    spread[:, :: dilation[0], :: dilation[1]] = kernels
    return spread


def cropped(kernels: np.ndarray) -> np.ndarray:
    """Return the middle of kernels (…, h, w), at most `KERNEL_SIDE` on each side, as finite float16."""
    for axis in (-2, -1):
        length = kernels.shape[axis]
        start = max(0, (length - KERNEL_SIDE) // 2)
        kernels = np.take(kernels, range(start, start + min(length, KERNEL_SIDE)), axis)
    limit = float(np.finfo(np.float16).max)
    return np.clip(kernels, -limit, limit).astype(np.float16)


def _pair(module: nn.Module, name: str) -> tuple[int, int]:
    value = getattr(module, name, 1)
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
