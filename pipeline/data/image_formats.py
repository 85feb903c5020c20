"""Image formats: their suffixes, their first bytes, and whether this machine can decode them.

The table is the same on every machine. Only `can_decode` depends on the machine: AVIF and JPEG 2000 are optional parts
of Pillow, and HEIF needs the package pillow-heif. The driver lists the images that it can decode itself; this list
identifies the dataset and is sent to the workers, which never list anything. A worker without a decoder reports each
such image as failed, with the reason.
"""

import dataclasses
import functools
import importlib
import re
from collections.abc import Iterable

from PIL import features

# Number of bytes at the beginning of a file that suffice to identify its format.
HEAD = 64


@dataclasses.dataclass(frozen=True)
class Format:
    """An image format.

    Attributes:
        name: Name for messages.
        suffixes: Suffixes of its files, in lower case, with the dot.
        magic: Regular expression that matches the first bytes of its files.
        feature: Pillow's name of the decoder, if that is an optional part of Pillow.
        install_hint: How to install the decoder, if it is optional.
    """

    name: str
    suffixes: tuple[str, ...]
    magic: bytes
    feature: str = ""
    install_hint: str = ""


HEIF = Format(
    "HEIF",
    (".heic", ".heif", ".hif"),
    rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)",
    install_hint='pip install "neuron-atlas[heic]", or scripts/setup heic in a checkout',
)
TIFF = Format("TIFF", (".tif", ".tiff"), rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]")

# HEIF follows AVIF: a file with one of the general brands mif1 and msf1 is AVIF if it also lists an AVIF brand.
FORMATS = (
    Format("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif"), rb"\xff\xd8\xff"),
    Format("PNG", (".png", ".apng"), rb"\x89PNG\r\n\x1a\n"),
    Format("WebP", (".webp",), rb"RIFF.{4}WEBP"),
    Format("BMP", (".bmp", ".dib"), rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0{3}"),
    Format("GIF", (".gif",), rb"GIF8[79]a"),
    TIFF,
    Format("PNM", (".ppm", ".pgm", ".pbm", ".pnm"), rb"P[1-6]\s+[\d#]"),
    Format("QOI", (".qoi",), rb"qoif"),
    Format("TGA", (".tga",), rb"(?!)"),  # the format has no magic number
    Format(
        "JPEG 2000",
        (".jp2", ".j2k", ".jpx", ".jpf", ".j2c", ".jpc"),
        rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
        "jpg_2000",
        "install a Pillow that was built with OpenJPEG",
    ),
    Format(
        "AVIF",
        (".avif",),
        rb".{4}ftyp(avi[fs]|(mif1|msf1).{4}(.{4})*?avi[fs])",
        "avif",
        "install Pillow 11.3 or later, built with libavif",
    ),
    HEIF,
)


def identify(head: bytes) -> Format | None:
    """Return the format of a file with these first bytes, or None if it is in no format of the table."""
    return next((f for f in FORMATS if re.match(f.magic, head[:HEAD], re.DOTALL)), None)


@functools.cache
def can_decode(image_format: Format) -> bool:
    """Return whether this machine can decode a format."""
    if image_format is HEIF:
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError:
            return False
        return True
    # Pillow emits a warning if `check` is called with a feature that it is too old for.
    supported = features.modules.keys() | features.codecs.keys()
    feature = image_format.feature
    return not feature or (feature in supported and bool(features.check(feature)))


def suffixes() -> frozenset[str]:
    """Return the suffixes of all formats that this machine can decode."""
    return frozenset(suffix for f in FORMATS if can_decode(f) for suffix in f.suffixes)


def install_hints(file_suffixes: Iterable[str]) -> list[str]:
    """Return how to install the missing decoders, one sentence for each format of `file_suffixes` that needs one."""
    file_suffixes = set(file_suffixes)
    return [
        f"to read {', '.join(sorted(file_suffixes & set(f.suffixes)))}: {f.install_hint}"
        for f in FORMATS
        if file_suffixes & set(f.suffixes) and not can_decode(f)
    ]


def identify_decodable(head: bytes) -> Format | None:
    """Return the format of a file with these first bytes, as `identify`.

    Raises:
        ValueError: If this machine has no decoder for it.
    """
    image_format = identify(head)
    if image_format is not None and not can_decode(image_format):
        raise ValueError(f"no decoder: {image_format.name} ({image_format.install_hint})")
    return image_format
