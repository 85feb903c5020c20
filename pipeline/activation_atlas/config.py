"""Settings of activation atlases."""

import dataclasses
from typing import Annotated

from pydantic import Field

# Cells on the longer side, at most: 10,000 visualizations, about as many as a page can show.
MAX_GRID = 100


@dataclasses.dataclass(frozen=True)
class ActivationAtlasConfig:
    """Activation atlases of layers. `conf/activation_atlas/default.yaml` explains each key.

    Attributes:
        layers: Layers of the run, as globs on their names or aliases; empty for no activation atlas.
        images: Number of dataset images that are sampled, at most one of each source; 0 for all images.
        positions: Number of positions that are sampled in each image.
        grid: Number of cells on the longer side of the plane.
        min_count: Smallest number of samples of a cell that gets a visualization.
        size: Side of a visualization in pixels.
        steps: Optimization steps of a visualization.
    """

    layers: tuple[str, ...] = ()
    images: Annotated[int, Field(ge=0)] = 0
    positions: Annotated[int, Field(ge=1)] = 1
    grid: Annotated[int, Field(ge=1, le=MAX_GRID)] = 20
    min_count: Annotated[int, Field(ge=1)] = 1
    size: Annotated[int, Field(ge=32, le=512)] = 96
    steps: Annotated[int, Field(ge=1)] = 96
