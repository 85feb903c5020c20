"""Pictures of any number of channels: satellite bands, stained tissue, stacks; read from TIFF or NumPy files.

A network of one channel sees photographs in grey and one of three in RGB. Every other number of channels needs
files that have as many bands. Pages show the first three bands as red, green and blue, or the first one alone.

Pixel values become levels from 0 to 255 by the type in which a file stores them, and never by the values themselves, so
that the images of a dataset keep their brightness relative to each other. Types of more than 8 bits keep fractions of a
level, as float32.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

SUFFIXES = frozenset({".npy", ".tif", ".tiff"})

# Pictures of more pixels than this are decoded one at a time, however many threads there are.
LARGE = 8_000_000
_one_large = threading.Lock()

# Floats beyond [0, 1] by no more than this come from rounding; it is a fortieth of a level.
TOLERANCE = 1e-4

# Weights of red, green and blue in grey, as Pillow has them (ITU-R BT.601).
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class Bands:
    """n grey images of one size that resize and crop together, with the few methods of an image that `photos` needs.

    All are 8-bit images, or all hold levels from 0 to 255 as float32.
    """

    def __init__(self, bands: list[Image.Image]) -> None:
        self._bands = bands
        self.size = bands[0].size
        self.width, self.height = self.size

    @classmethod
    def of(cls, values: np.ndarray, copies: int = 1) -> "Bands":
        """From (H, W, n) levels, uint8 or float32; each band is repeated so many times."""
        images = [Image.fromarray(np.ascontiguousarray(values[..., i])) for i in range(values.shape[-1])]
        return cls([image for image in images for _ in range(copies)])

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> "Bands":
        """All bands at another (width, height)."""
        return self._each(lambda band: band.resize(size, resample))

    def crop(self, box: tuple[int, int, int, int]) -> "Bands":
        """The (left, top, right, bottom) part of all bands."""
        return self._each(lambda band: band.crop(box))

    def _each(self, work: Callable[[Image.Image], Image.Image]) -> "Bands":
        """`work` on every band, once on those that are repeated."""
        done = {key: work(band) for key, band in {id(band): band for band in self._bands}.items()}
        return Bands([done[id(band)] for band in self._bands])

    def visible(self) -> Image.Image:
        """As a page shows it, in 8 bits: the first three bands as RGB, or the first alone if there are fewer."""
        shown = self._bands[: 3 if len(self._bands) > 2 else 1]
        bytes_ = Bands(shown)._each(_bytes)._bands
        return bytes_[0] if len(bytes_) == 1 else Image.merge("RGB", bytes_)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        """(H, W, n) uint8, or float32 within 0 and 255: interpolation may overshoot."""
        values = np.stack([np.asarray(band) for band in self._bands], axis=-1)
        return values if values.dtype == np.uint8 else values.clip(0, 255)


def _bytes(band: Image.Image) -> Image.Image:
    """A copy in 8 bits."""
    if band.mode == "L":
        return band.copy()
    return Image.fromarray(np.asarray(band).clip(0, 255).round().astype(np.uint8))


@contextlib.contextmanager
def decoding(width: int, height: int, limit: int | None) -> Iterator[None]:
    """Decode a picture of this size inside. Raises ValueError where it has more pixels than `limit`, if any."""
    if limit is not None and width * height > limit:
        raise ValueError(f"too large: {width} × {height} pixels; data.max_pixels allows {limit:,}")
    with _one_large if width * height > LARGE else contextlib.nullcontext():
        yield


def levels(values: np.ndarray, top: int | None = None) -> np.ndarray:
    """Pixel values as levels from 0 to 255, by their type alone: uint8 as they are, all others as float32.

    Integers are scaled by the largest value of their type, or by `top`, the largest of the type in the file; floats
    by 1. Raises ValueError for negative integers, floats outside [0, 1] and values that are not finite.
    """
    if values.dtype == np.bool_:
        return values * np.uint8(255)
    if np.issubdtype(values.dtype, np.integer):
        top = top or int(np.iinfo(values.dtype).max)
        if values.dtype == np.uint8 and top == 255:
            return values
        if values.dtype.kind == "i" and values.min() < 0:
            raise ValueError(f"unsupported values: negative integers, down to {values.min()}")
        # float32 holds integers of 16 bits exactly, float64 those of 32.
        kind = np.float32 if values.dtype.itemsize <= 2 else np.float64
        return np.multiply(values, kind(255 / top), dtype=kind).astype(np.float32)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"unsupported values: of type {values.dtype}")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("unsupported values: NaN or infinity")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(f"unsupported values: floats from {low:g} to {high:g}, and floats must lie in [0, 1]")
    return (values.astype(np.float32) * 255).clip(0, 255)


def read(path: Path, channels: int, limit: int | None) -> Bands:
    """A file of `channels` bands, first or last axis, as levels.

    Raises ValueError for another file, another number of bands, or more than `limit` pixels.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"the network takes {channels} channels, which only {', '.join(sorted(SUFFIXES))} can hold")
    if path.suffix.lower() == ".npy":
        # Memory-mapped, so that nothing is read before the shape is known.
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        with decoding(*_size(values.shape, channels), limit):
            return _ordered(levels(np.asarray(values)), channels)
    import tifffile

    with tifffile.TiffFile(path) as opened:
        series = opened.series[0]
        with decoding(*_size(series.shape, channels), limit):
            return _ordered(_scaled(series.asarray(), series.keyframe), channels)


def _size(shape: tuple[int, ...], channels: int) -> tuple[int, int]:
    """(width, height) of an array of bands."""
    if len(shape) != 3 or channels not in (shape[0], shape[-1]):
        raise ValueError(f"an array of {shape} is no picture of {channels} bands")
    return (shape[1], shape[0]) if shape[-1] == channels else (shape[2], shape[1])


def _ordered(values: np.ndarray, channels: int) -> Bands:
    return Bands.of(values if values.shape[-1] == channels else values.transpose(1, 2, 0))


def _scaled(values: np.ndarray, page: object) -> np.ndarray:
    """Levels of what tifffile read from a page: by its number of bits, and turned round where 0 is white."""
    top = None
    if np.issubdtype(values.dtype, np.integer):
        top = 2 ** (int(page.bitspersample) - (values.dtype.kind == "i")) - 1  # type: ignore[attr-defined]
    found = levels(values, top)
    return 255 - found if page.photometric == 0 else found  # type: ignore[attr-defined]


def from_tiff(file: IO[bytes], channels: int, limit: int | None) -> Bands:
    """The first page of a TIFF that Pillow does not read, such as floats in RGB or of 64 bits, in grey or RGB.

    Raises ValueError where it is neither.
    """
    import tifffile

    with tifffile.TiffFile(file) as opened:
        page = opened.pages.first
        with decoding(page.imagewidth, page.imagelength, limit):
            values = page.asarray()
        values = values.transpose(1, 2, 0) if page.axes == "SYX" else values
        values = values[..., None] if values.ndim == 2 else values
        if values.ndim != 3 or (values.shape[-1], int(page.photometric)) not in ((1, 0), (1, 1), (3, 2)):
            raise ValueError(f"unsupported values: {page.axes} {values.shape} of type {values.dtype} in a TIFF")
        found = _scaled(values, page)
        if channels == 1 and found.shape[-1] == 3:
            found = (found @ LUMA)[..., None]
        return Bands.of(found, channels // found.shape[-1])


def visible(pixels: np.ndarray) -> Image.Image:
    """(H, W, C) uint8 as a page shows it: grey, RGB, or the first three bands (the first, if there are two)."""
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3]))
