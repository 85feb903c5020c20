"""Configuration of the site."""

import dataclasses
from collections.abc import Mapping

from pipeline.core.errors import AtlasError

LICENCES = ("full", "crop", "blur", "ids")
FORMATS = ("webp", "avif", "jpeg")
# Valid ranges (lowest, highest) of the integer settings.
RANGES = {
    "quality": (1, 100),
    "picture_px": (32, 1024),
    "thumb_px": (16, 256),
    "example_px": (16, 256),
    "photo_px": (32, 1024),
    "examples": (0, 64),
    "least": (0, 64),
    "per_bin": (0, 16),
    "similar": (0, 64),
    "strip": (1, 32),
}
LOWER_BOUNDS = {"max_bytes": 1_000_000, "max_files": 100}


@dataclasses.dataclass(frozen=True)
class SiteConfig:
    """Appearance of the site and limits on its size.

    Sizes are in pixels and are upper limits: if the site would exceed `max_bytes`, smaller sizes are chosen, and if it
    would exceed `max_files`, more images share a file.

    Attributes:
        title: Title of the site.
        format: File format of feature visualizations: webp, avif or jpeg.
        photo_format: File format of dataset images, which are JPEG already.
        quality: Encoder quality, 1 to 100.
        picture_px: Longer side of a feature visualization.
        thumb_px: Side of a thumbnail.
        example_px: Side of a crop of a dataset image.
        photo_px: Longer side of a whole dataset image.
        examples: Number of dataset examples with the highest activations per unit.
        least: Number of dataset examples with the lowest activations per unit.
        per_bin: Number of dataset examples per quantile bin of a unit's activations.
        similar: Number of similar units of the same layer per unit.
        strip: Number of images in a layer's strip on the home page.
        licence: What may be shown of dataset images: `full` (crops and whole images), `crop` (only receptive fields),
            `blur` (both, blurred) or `ids` (only paths).
        families: YAML file of named groups of units; None uses families.yaml beside the atlas if it exists.
        aliases: Current layer names by former layer names, so that old links keep working.
        max_bytes: Largest size of the site in bytes.
        max_files: Largest number of files.
        workers: Number of encoding processes; `auto` chooses by the amount of work and the number of CPUs.

    Raises:
        AtlasError: If a value is invalid.
    """

    title: str = "Neuron Atlas"
    format: str = "webp"
    photo_format: str = "jpeg"
    quality: int = 78
    picture_px: int = 256
    thumb_px: int = 96
    example_px: int = 96
    photo_px: int = 256
    examples: int = 8
    least: int = 4
    per_bin: int = 2
    similar: int = 8
    strip: int = 8
    licence: str = "full"
    families: str | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    max_bytes: int = 900_000_000
    max_files: int = 10_000
    workers: int | str = "auto"

    def __post_init__(self) -> None:
        for key, valid in (("licence", LICENCES), ("format", FORMATS), ("photo_format", FORMATS)):
            if getattr(self, key) not in valid:
                raise AtlasError(f"site.{key}={getattr(self, key)!r} is not one of {', '.join(valid)}.")
        for key, (lowest, highest) in RANGES.items():
            if not lowest <= getattr(self, key) <= highest:
                raise AtlasError(f"site.{key}={getattr(self, key)} must be between {lowest} and {highest}.")
        for key, lowest in LOWER_BOUNDS.items():
            if getattr(self, key) < lowest:
                raise AtlasError(f"site.{key}={getattr(self, key)} is too small; use at least {lowest:,}.")
        if self.workers != "auto" and (isinstance(self.workers, str) or self.workers < 1):
            raise AtlasError(f"site.workers={self.workers!r} must be auto or a positive integer.")
