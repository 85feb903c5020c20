"""Image formats: the suffixes and the first bytes they are known by, and whether this machine can decode them.

The table is the same on every machine. Only `readable` depends on the machine: AVIF and JPEG 2000 are optional parts of
Pillow, and HEIF needs the package pillow-heif. The machine that lists a dataset (the driver) lists what it can decode
itself; the list identifies the dataset and is sent to the workers, which never list anything. A worker that lacks a
decoder reports each such image as failed, with the reason.
"""

import dataclasses
import functools
import importlib
import re
from collections.abc import Iterable

from PIL import features

# So many bytes at the beginning of a file are enough to tell its format.
HEAD = 64


@dataclasses.dataclass(frozen=True)
class Format:
    """An image format; `start` matches the beginning of a file.

    `feature` is Pillow's name of an optional decoder, `remedy` how to get it.
    """

    name: str
    suffixes: tuple[str, ...]
    start: bytes
    feature: str = ""
    remedy: str = ""


HEIF = Format(
    "HEIF",
    (".heic", ".heif", ".hif"),
    rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)",
    remedy='pip install "neuron-atlas[heic]", or scripts/setup heic in a checkout',
)
TIFF = Format("TIFF", (".tif", ".tiff"), rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]")

# HEIF comes after AVIF: a file of the general brands mif1 and msf1 is AVIF if it names that brand as well.
FORMATS = (
    Format("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif"), rb"\xff\xd8\xff"),
    Format("PNG", (".png", ".apng"), rb"\x89PNG\r\n\x1a\n"),
    Format("WebP", (".webp",), rb"RIFF.{4}WEBP"),
    Format("BMP", (".bmp", ".dib"), rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0{3}"),
    Format("GIF", (".gif",), rb"GIF8[79]a"),
    TIFF,
    Format("PNM", (".ppm", ".pgm", ".pbm", ".pnm"), rb"P[1-6]\s+[\d#]"),
    Format("QOI", (".qoi",), rb"qoif"),
    Format("TGA", (".tga",), rb"(?!)"),  # has no first bytes of its own
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


def identified(head: bytes) -> Format | None:
    """The format of a file with these first bytes; None where it is no image format of the table."""
    return next((f for f in FORMATS if re.match(f.start, head[:HEAD], re.DOTALL)), None)


@functools.cache
def readable(found: Format) -> bool:
    """Whether this machine can decode a format."""
    if found is HEIF:
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError:
            return False
        return True
    # Pillow warns when it is asked for a feature that it is too old to know.
    known = features.modules.keys() | features.codecs.keys()
    return not found.feature or (found.feature in known and bool(features.check(found.feature)))


def suffixes() -> frozenset[str]:
    """The suffixes of all formats that this machine can decode."""
    return frozenset(suffix for f in FORMATS if readable(f) for suffix in f.suffixes)


def remedies(kinds: Iterable[str]) -> list[str]:
    """How to read those of the suffixes `kinds` that are images which this machine cannot decode."""
    kinds = set(kinds)
    return [
        f"to read {', '.join(sorted(kinds & set(f.suffixes)))}: {f.remedy}"
        for f in FORMATS
        if kinds & set(f.suffixes) and not readable(f)
    ]


def check(head: bytes) -> Format | None:
    """The format of a file with these first bytes. Raises ValueError where this machine has no decoder for it."""
    found = identified(head)
    if found is not None and not readable(found):
        raise ValueError(f"no decoder: {found.name} ({found.remedy})")
    return found
