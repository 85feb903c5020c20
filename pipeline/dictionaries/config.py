"""Settings of `atlas dictionary`."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field


@dataclasses.dataclass(frozen=True)
class DictionaryConfig:
    """What is fitted to the activations of a layer, and to which of them.

    Attributes:
        layer: Name of the layer.
        out: File that is written, with the suffix .safetensors.
        method: "topk" trains a sparse autoencoder; "pca", "ica" and "nmf" decompose the activations; "directions" turns
            given vectors into a dictionary; "concept" separates the images of two folders.
        latents: Number of latents; None for 8 times the channels with "topk", and as many as the layer has channels,
            at most 64, for decompositions.
        k: Latents that are active at a position, with "topk".
        steps: Optimization steps, with "topk".
        batch: Positions in one step, with "topk".
        rate: Learning rate, with "topk".
        images: Most dataset images that are read.
        positions: Most positions of an image that are used; 0 for all.
        seed: Seed of everything random.
        vectors: File .npy of directions (N, C), with "directions".
        whiten: Whether the directions are multiplied by the inverse covariance of the activations.
        positive: Folder of images that show a concept.
        negative: Folder of images that do not show it.
        name: Name of the concept; None for that of the folder.
    """

    layer: str
    out: str
    method: Literal["topk", "pca", "ica", "nmf", "directions", "concept"] = "topk"
    latents: Annotated[int, Field(ge=1)] | None = None
    k: Annotated[int, Field(ge=1)] = 32
    steps: Annotated[int, Field(ge=1)] = 2000
    batch: Annotated[int, Field(ge=1)] = 1024
    rate: Annotated[float, Field(gt=0)] = 1e-3
    images: Annotated[int, Field(ge=1)] = 10_000
    positions: Annotated[int, Field(ge=0)] = 0
    seed: int = 0
    vectors: str | None = None
    whiten: bool = False
    positive: str | None = None
    negative: str | None = None
    name: str | None = None
