"""Regularizers in the space of a layer: distances between its activations for the image and for the initial image.

They keep a visualization that starts from a photograph near it as the network sees it, where the image regularizer
`prior` keeps its pixels near those of the photograph.
"""

import dataclasses
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.core.registry import Registry

LAYER_PENALTIES = Registry("layer penalty")

# The layer that stands for null: the one up to which the network does this share of its computation.
DEFAULT_DEPTH = 1 / 3


@dataclasses.dataclass(frozen=True)
class LayerRegularizer:
    """Base class of regularizers in the space of a layer.

    At each step the initial image gets the same random transformations as the image. With the loss d and the objective
    f, f - w b d is maximized. The factor b (`balance`) is fixed for each image at the first step at which it is known:
    with a weight w of 1, both terms have gradients of the same size there. It does not depend on the value of f, which
    is near 0 for most images in a layer that no rectifier follows.

    Attributes:
        weight: Factor of the loss.
        layer: The layer, any of the network; None for the one up to which the network does a third of its computation.
            A plan sets it; where none has, it is the layer of the unit.
    """

    weight: Annotated[float, Field(ge=0)]
    layer: str | None = None

    # The loss from which `balance` is measured: the gradient of a distance says nothing at the initial image itself.
    least: ClassVar[float] = 0.0

    def value(self, maps: Tensor, reference: Tensor) -> Tensor:
        """Return the loss of each image, to be minimized.

        Args:
            maps: (B, C, H, W) activations of the layer for the images.
            reference: (B, C, H, W) those for the initial images.

        Returns:
            (B,) at least 0, and 0 where the activations are equal.
        """
        raise NotImplementedError


def balance(objective: Tensor, loss: Tensor) -> Tensor:
    """Return the factor of a loss that gives its gradient the size of that of the objective.

    The ratio of the sums of absolute values, Σ|∇f| ÷ Σ|∇d|, over the parameters of one image: `accent_reg_balance` of
    the code of Hamblin et al. 2024 (github.com/chrishamblin7/faccent, `render_vis`).

    Args:
        objective: (B, …) gradients of the objective in the parameters of the images.
        loss: (B, …) gradients of the loss.

    Returns:
        (B,) at least 0; 0 where one of the gradients is 0.
    """
    sizes = [gradient.flatten(1).abs().sum(dim=1) for gradient in (objective, loss)]
    return torch.where(sizes[1] > 0, sizes[0] / sizes[1].clamp(min=torch.finfo(sizes[1].dtype).tiny), 0.0)


@LAYER_PENALTIES.add("seed_distance")
@dataclasses.dataclass(frozen=True)
class SeedDistance(LayerRegularizer):
    """Distance between the activations of a layer for the image and for the photograph that it started from.

    Feature accentuation (Hamblin et al. 2024, arXiv 2402.10039). With `distance` = `l2` it is
    |a - b| ÷ |b|, the Euclidean distance over all channels and positions relative to the activations b of the
    photograph, so that it means the same in every layer. With `cosine` it is 1 - cos(a, b), the mean over positions
    of the cosines over channels: the strength of the activations is then free.
    """

    weight: Annotated[float, Field(ge=0)] = 1.0
    distance: Literal["l2", "cosine"] = "l2"

    # Below this distance the gradient of the norm, which has none at 0, becomes that of its square.
    softness: ClassVar[float] = 1e-3
    least: ClassVar[float] = 2e-3

    def value(self, maps: Tensor, reference: Tensor) -> Tensor:
        """Return the distances, (B,)."""
        if self.distance == "cosine":
            dot = (maps * reference).sum(dim=1)
            norms = maps.norm(dim=1) * reference.norm(dim=1)
            return (1 - dot / norms.clamp(min=1e-12)).mean(dim=(1, 2))
        size = reference.flatten(1).pow(2).sum(dim=1).clamp(min=1e-12)
        square = (maps - reference).flatten(1).pow(2).sum(dim=1) / size
        return (square + self.softness**2).sqrt() - self.softness
