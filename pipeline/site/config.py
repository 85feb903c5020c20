"""What a user may choose about the site."""

import dataclasses
from collections.abc import Mapping

from pipeline.core.errors import AtlasError

LICENCES = ("full", "crop", "blur", "ids")
FORMATS = ("webp", "avif", "jpeg")


@dataclasses.dataclass(frozen=True)
class SiteConfig:
    """What the site looks like and how large it may become.

    Sizes are in pixels and are the largest that are used: where the site would not fit into `max_bytes`, smaller
    ones are chosen, and where it would not fit into `max_files`, more pictures share a file. `examples` photographs
    with the largest responses, `least` with the lowest and `per_bin` of each bin of the spectrum are shown of a unit,
    `similar` units of its layer beside it, and `strip` pictures of a layer on the first page.

    `format` is that of rendered pictures, `photo_format` that of photographs, which are JPEG already.
    `licence` says what may be shown of photographs: `full` (crops and whole pictures), `crop` (only what units saw),
    `blur` (both, blurred), `ids` (names alone). `families` is a YAML file of named groups of units; null takes
    families.yaml beside the atlas, if it is there. `aliases` maps former layer names to present ones, so that old
    links still lead somewhere. `workers` processes encode; `auto` decides by the work and the machine.
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
        for key, least, most in (
            ("quality", 1, 100), ("picture_px", 32, 1024), ("thumb_px", 16, 256), ("example_px", 16, 256),
            ("photo_px", 32, 1024), ("examples", 0, 64), ("least", 0, 64), ("per_bin", 0, 16), ("similar", 0, 64),
            ("strip", 1, 32),
        ):  # fmt: skip
            if not least <= getattr(self, key) <= most:
                raise AtlasError(f"site.{key}={getattr(self, key)} must lie between {least} and {most}.")
        for key, least in (("max_bytes", 1_000_000), ("max_files", 100)):
            if getattr(self, key) < least:
                raise AtlasError(f"site.{key}={getattr(self, key)} is too small: at least {least:,}.")
        if self.workers != "auto" and (isinstance(self.workers, str) or self.workers < 1):
            raise AtlasError(f"site.workers={self.workers!r}: use auto or a number from 1.")
