"""Terms over all variants of a unit. Only these make the images of a batch depend on each other.

Images of different units are always independent.
"""

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pipeline.core.registry import Registry

COUPLINGS = Registry("coupling")


@dataclasses.dataclass(frozen=True)
class BatchTerm:
    """Base class of terms that are added to the objective.

    A term on a layer is measured relative to the objective: with weight 1, a change of the term by 1 is worth as much
    as the current absolute value of the objective. A term on images is weighted as image regularizers are.

    Attributes:
        weight: Factor of the term.
        space: What the term is computed from: "layer" for the maps of a layer (the field `layer`, None for that of the
            unit), "image" for the images.
    """

    weight: float
    space: ClassVar[Literal["layer", "image"]] = "layer"

    def value(self, groups: Tensor) -> Tensor:
        """Return the values to be maximized, (G, V), for (G, V, C, H, W) maps or images of V variants of G units."""
        raise NotImplementedError


@COUPLINGS.add("diversity")
@dataclasses.dataclass(frozen=True)
class Diversity(BatchTerm):
    """Negative mean cosine between the Gram matrix of an image and those of the other variants, in -1 … 0.

    Olah, Mordvintsev & Schubert 2017, "Diversity". `layer` is the layer that the Gram matrices are computed from; null
    is that of the unit. For a vector (logits) the Gram matrix is the outer product of the activations: choose a layer
    with maps.
    """

    weight: float = 1.0
    layer: str | None = None

    def value(self, groups: Tensor) -> Tensor:
        """Return the negative mean pairwise cosine, (G, V)."""
        cosine = gram_cosine(groups)
        num_others = max(1, groups.shape[1] - 1)
        return -(cosine.sum(dim=2) - torch.diagonal(cosine, dim1=1, dim2=2)) / num_others


@COUPLINGS.add("alignment")
@dataclasses.dataclass(frozen=True)
class Alignment(BatchTerm):
    """Negative half of the sum of squared differences to the images of the next and the previous variant."""

    weight: float = 0.2
    space: ClassVar[Literal["layer", "image"]] = "image"

    def value(self, groups: Tensor) -> Tensor:
        """Return the negative half of the squared distances to both neighbors, (G, V)."""
        step = 0.5 * (groups[:, 1:] - groups[:, :-1]).pow(2).sum(dim=(2, 3, 4))
        zero = step.new_zeros(step.shape[0], 1)
        return -(torch.cat([step, zero], dim=1) + torch.cat([zero, step], dim=1))


def gram_cosine(groups: Tensor) -> Tensor:
    """Return the cosines between Gram matrices (C × C sums of products over positions): (G, V, C, H, W) → (G, V, V)."""
    flat = groups.flatten(3)
    gram = (flat @ flat.transpose(2, 3)).flatten(2)
    gram = gram / gram.norm(dim=2, keepdim=True).clamp(min=1e-12)
    return gram @ gram.transpose(1, 2)
