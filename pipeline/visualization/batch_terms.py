"""Terms that look at all pictures of a unit together: the only thing that couples images of a batch.

The pictures of a unit are its variants; pictures of different units never see each other.
"""

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from pipeline.core.registry import Registry

COUPLINGS = Registry("coupling")


@dataclasses.dataclass(frozen=True)
class BatchTerm:
    """A term that is added to the objective, times `weight`.

    `space` says what it looks at: the maps of a layer (`layer`, null for the unit's own), or the images.
    A term on a layer is measured against the objective: weight 1 makes a change of the term by 1 worth as much as
    the objective's present magnitude. A term on images is measured as penalties are.
    """

    weight: float
    space: ClassVar[Literal["layer", "image"]] = "layer"

    def value(self, groups: Tensor) -> Tensor:
        """(G, V, C, H, W) of V variants of G units → (G, V) values to be raised."""
        raise NotImplementedError


@COUPLINGS.add("diversity")
@dataclasses.dataclass(frozen=True)
class Diversity(BatchTerm):
    """Minus the mean cosine between a picture's Gram matrix and those of its siblings, in -1 … 0.

    Olah, Mordvintsev & Schubert 2017, "Diversity". `layer` is where styles are compared; null: the unit's own
    layer. For a vector (logits) the Gram matrix is the outer product of the responses: name a layer with maps.
    """

    weight: float = 1.0
    layer: str | None = None

    def value(self, groups: Tensor) -> Tensor:
        """Minus mean pairwise cosine, (G, V)."""
        cosine = gram_cosine(groups)
        others = max(1, groups.shape[1] - 1)
        return -(cosine.sum(dim=2) - torch.diagonal(cosine, dim1=1, dim2=2)) / others


@COUPLINGS.add("alignment")
@dataclasses.dataclass(frozen=True)
class Alignment(BatchTerm):
    """Minus half the sum of squared differences from the next and the previous variant's image."""

    weight: float = 0.2
    space: ClassVar[Literal["layer", "image"]] = "image"

    def value(self, groups: Tensor) -> Tensor:
        """Minus half the squared distances to both neighbours, (G, V)."""
        step = 0.5 * (groups[:, 1:] - groups[:, :-1]).pow(2).sum(dim=(2, 3, 4))
        zero = step.new_zeros(step.shape[0], 1)
        return -(torch.cat([step, zero], dim=1) + torch.cat([zero, step], dim=1))


def gram_cosine(groups: Tensor) -> Tensor:
    """(G, V, C, H, W) → (G, V, V) cosines between Gram matrices (C × C sums of products over positions)."""
    flat = groups.flatten(3)
    gram = (flat @ flat.transpose(2, 3)).flatten(2)
    gram = gram / gram.norm(dim=2, keepdim=True).clamp(min=1e-12)
    return gram @ gram.transpose(1, 2)
