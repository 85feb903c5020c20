"""Settings of the effects of units."""

import dataclasses
from typing import Annotated

from pydantic import Field


@dataclasses.dataclass(frozen=True)
class EffectsConfig:
    """How the effects of units on the network's outputs are measured. `conf/effects/default.yaml` explains each key.

    Attributes:
        images: Number of dataset images, at most one of each source; 0 measures no effects.
        ablated: Number of units per layer whose effect is also measured by ablation, evenly spaced among those of the
            atlas.
        examples: Number of dataset images per unit that are listed by relevance, with a mask in pixels each.
        connections: Number of these images over which the attributions of connections between units are measured.
        batch: Images, or copies of an image with ablated units, in one forward pass.
    """

    images: Annotated[int, Field(ge=0)] = 0
    ablated: Annotated[int, Field(ge=0)] = 8
    examples: Annotated[int, Field(ge=0)] = 4
    connections: Annotated[int, Field(ge=0)] = 0
    batch: Annotated[int, Field(ge=1)] = 16
