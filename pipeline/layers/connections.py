"""Connections between the channels of two layers: `layers.connectivity` finds them, readers of an atlas see them."""

import dataclasses
from typing import Literal

import numpy as np

# Number of connections that are stored for each channel.
NUM_CONNECTIONS = 8

# What the strength of a connection is scaled by: the source channel's standard deviation over the dataset, or nothing.
Scale = Literal["sd", "1"]


@dataclasses.dataclass(frozen=True)
class Connectivity:
    """The strongest connections of each channel of one layer with the channels of another, strongest first.

    Attributes:
        layer: Name of the other layer.
        channel: Channels of the other layer, (C, k) int32 with k at most `NUM_CONNECTIONS`; -1 where the strength is 0.
        norm: L2 norms of the effective kernels, (C, k) float32, in units of the reading layer per unit of the source.
        sum: Sums of the effective kernels, (C, k) float32, in the same units.
        strength: What connections are ranked by, (C, k) float32: `norm` times the source channel's scale.
        scale: The scale: "sd" for the standard deviation over the dataset, "1" if it is not known.
        approximate: Paths of modules that are in the weights only in part: normalizations that divide by statistics
            of each image (their γ is included if they have one), and convolutions that change their weights in the
            forward pass (the stored weights are used).
        kernel: The effective kernels, cropped to their middle, (C, k, h, w) float16; None if they are no images.
        path: Paths of the convolutions and linear layers that lie between the two layers.
        bypassed: Those of `path` that a residual path or a parallel branch goes around.
        gated: Paths of the activation functions between, if `linearized`.
        linearized: Whether the weights are those of `circuits.paths.LinearPath`; False for layers that feed each other
            through channel-wise modules, whose activation functions are left out.
        residual: Sums of the kernels along the paths around all of `bypassed`, (C, k) float32; None without such paths.
    """

    layer: str
    channel: np.ndarray
    norm: np.ndarray
    sum: np.ndarray
    strength: np.ndarray
    scale: Scale = "1"
    approximate: tuple[str, ...] = ()
    kernel: np.ndarray | None = None
    path: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()
    gated: tuple[str, ...] = ()
    linearized: bool = False
    residual: np.ndarray | None = None


def strongest(every: Connectivity) -> Connectivity:
    """Select the largest strengths of each row of (O, I) norms, sums and strengths; `channel` is computed here."""
    count = min(NUM_CONNECTIONS, every.strength.shape[1])
    order = np.argsort(-every.strength, axis=1, kind="stable")[:, :count]
    norm, total, strength = (
        np.take_along_axis(values, order, 1).astype(np.float32) for values in (every.norm, every.sum, every.strength)
    )
    channel = np.where(strength > 0, order, -1).astype(np.int32)
    return dataclasses.replace(every, channel=channel, norm=norm, sum=total, strength=strength)
