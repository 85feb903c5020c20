"""Configuration of the site."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.validation import Use

ImageFormat = Literal["webp", "avif", "jpeg"]
Address = Annotated[
    Annotated[str, Field(pattern=r"^https?://[^\s/]+(/\S*)?$")] | None,
    Use("an address that begins with https:// or http://, or null"),
]


@dataclasses.dataclass(frozen=True)
class SiteConfig:
    """Appearance of the site and limits on its size.

    Sizes are in pixels and are upper limits: if the site would exceed `max_bytes`, smaller sizes are chosen, and if it
    would exceed `max_files`, more images share a file.

    Attributes:
        title: Title of the site.
        author: Authors, as they stand in a citation, e.g. "Ada Lovelace and Charles Babbage"; None if not named.
        url: Address of the site on its host; None if it is not known. Canonical addresses, the sitemap and absolute
            addresses of preview images need it.
        atlas_url: Address that the file of the atlas can be downloaded from.
        copy_atlas: Whether the file of the atlas is a part of the site.
        cards: Which preview images (1200 × 630 pixels) are made: `layers` (of the home page and each layer), `all` (of
            each unit too), or `none`. Each unit has a page with an address of its own: with `all`, and with `layers` if
            there are at most `max_files` / 3 units.
        format: File format of feature visualizations: webp, avif or jpeg.
        photo_format: File format of dataset images, which are JPEG already.
        quality: Encoder quality, 1 to 100.
        picture_px: Longer side of a feature visualization.
        thumb_px: Side of a thumbnail.
        example_px: Side of a crop of a dataset image.
        photo_px: Longer side of a whole dataset image.
        examples: Number of dataset examples with the highest activations per unit.
        means: Number of dataset examples with the highest means of the activation map per unit; none if a map has one
            position.
        least: Number of dataset examples with the lowest activations per unit.
        relevant: Number of dataset images that use a unit most, if the atlas has effects.
        per_bin: Number of dataset examples per quantile bin of a unit's activations.
        similar: Number of similar units of all layers per unit, at most.
        strip: Number of images in a layer's strip on the home page.
        licence: What may be shown of dataset images: `full` (crops and whole images), `crop` (only receptive fields),
            `blur` (both, blurred) or `ids` (only paths).
        families: YAML file of named groups of units; None uses families.yaml beside the atlas if it exists.
        aliases: Current layer names by former layer names, so that old links keep working.
        max_bytes: Largest size of the site in bytes.
        max_files: Largest number of files.
        own_image: Whether the site has the page `own-image.html`, on which the network runs in the browser. It needs
            the network, the package `onnx`, and ONNX Runtime Web from the npm registry.
        onnxruntime: Folder with the unpacked npm package onnxruntime-web; None fetches it once into the user's cache.
        workers: Number of encoding processes; `auto` chooses by the amount of work and the number of CPUs.
    """

    title: str = "Neuron Atlas"
    author: str | None = None
    url: Address = None
    atlas_url: Address = None
    copy_atlas: bool = False
    cards: Literal["all", "layers", "none"] = "layers"
    format: ImageFormat = "webp"
    photo_format: ImageFormat = "jpeg"
    quality: Annotated[int, Field(ge=1, le=100)] = 78
    picture_px: Annotated[int, Field(ge=32, le=1024)] = 256
    thumb_px: Annotated[int, Field(ge=16, le=256)] = 96
    example_px: Annotated[int, Field(ge=16, le=256)] = 96
    photo_px: Annotated[int, Field(ge=32, le=1024)] = 256
    examples: Annotated[int, Field(ge=0, le=64)] = 8
    means: Annotated[int, Field(ge=0, le=64)] = 4
    least: Annotated[int, Field(ge=0, le=64)] = 4
    relevant: Annotated[int, Field(ge=0, le=64)] = 4
    per_bin: Annotated[int, Field(ge=0, le=16)] = 2
    similar: Annotated[int, Field(ge=0, le=64)] = 8
    strip: Annotated[int, Field(ge=1, le=32)] = 8
    licence: Literal["full", "crop", "blur", "ids"] = "full"
    families: str | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    max_bytes: Annotated[int, Field(ge=1_000_000)] = 900_000_000
    max_files: Annotated[int, Field(ge=100)] = 10_000
    own_image: bool = False
    onnxruntime: str | None = None
    workers: Annotated[Annotated[int, Field(ge=1)] | Literal["auto"], Use("auto or a number from 1")] = "auto"
