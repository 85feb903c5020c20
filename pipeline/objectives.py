"""What to excite: a scalar per image, from one layer's responses.

An objective sees (B, C, H, W) maps and one channel per image, and couples no two images. `natural` names the
dataset statistic that measures photographs by the same yardstick, so that a picture can be held against them.
"""

import dataclasses
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from pipeline.registry import Registry

OBJECTIVES = Registry("objective")


@runtime_checkable
class Objective(Protocol):
    """What `render` needs of an objective."""

    natural: ClassVar[Literal["mean", "max"]]

    def value(self, maps: Tensor, channels: Tensor) -> Tensor:
        """(B, C, H, W) maps and (B,) channel numbers → (B,) values to be raised."""
        ...


def pick(maps: Tensor, channels: Tensor) -> Tensor:
    """(B, H, W): of each image the map of its own channel."""
    return maps[torch.arange(maps.shape[0], device=maps.device), channels]


@OBJECTIVES.add("channel")
@dataclasses.dataclass(frozen=True)
class Channel:
    """Mean of the channel over all positions (Distill's *channel* objective); a logit for the classifier."""

    natural: ClassVar[Literal["mean", "max"]] = "mean"

    def value(self, maps: Tensor, channels: Tensor) -> Tensor:
        """Spatial mean, (B,)."""
        return pick(maps, channels).mean(dim=(1, 2))


@OBJECTIVES.add("neuron")
@dataclasses.dataclass(frozen=True)
class Neuron:
    """The channel at the centre of its map (Distill's *neuron* objective)."""

    natural: ClassVar[Literal["mean", "max"]] = "max"

    def value(self, maps: Tensor, channels: Tensor) -> Tensor:
        """Response at row H // 2, column W // 2, (B,)."""
        own = pick(maps, channels)
        return own[:, own.shape[1] // 2, own.shape[2] // 2]
