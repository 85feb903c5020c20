"""Settings of facets."""

import dataclasses
from typing import Annotated

from pydantic import Field


@dataclasses.dataclass(frozen=True)
class FacetsConfig:
    """Facets of the units of some layers. `conf/facets/default.yaml` explains each key.

    Attributes:
        layers: Layers of the run, as globs on their names or aliases; empty for no facets.
        examples: Share of the dataset images that are a unit's examples.
        least: Smallest number of examples, whatever their share.
        most: Largest number of examples.
        embedding: Layer whose responses to the examples are compared; None for the last layer before the logits, and
            for the logits where that is the unit's own.
        level: Groups are one facet if one of them is among this share of random neighborhoods nearest to the other.
        power: Power of the cosine in the objective of the images.
        size: Side of an image in pixels.
        steps: Optimization steps of an image.
    """

    layers: tuple[str, ...] = ()
    examples: Annotated[float, Field(gt=0, le=1)] = 0.01
    least: Annotated[int, Field(ge=8)] = 32
    most: Annotated[int, Field(ge=8)] = 512
    embedding: str | None = None
    level: Annotated[float, Field(gt=0, lt=1)] = 0.1
    power: Annotated[float, Field(ge=0)] = 1.0
    size: Annotated[int, Field(ge=32, le=512)] = 128
    steps: Annotated[int, Field(ge=1)] = 128

    def count(self, images: int) -> int:
        """Return the number of examples of a unit of a dataset of so many images."""
        return min(images, max(self.least, min(self.most, round(self.examples * images))))
