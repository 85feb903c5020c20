"""Images with any number of channels (satellite bands, stained tissue, stacks), read from TIFF or NumPy files.

Networks with one input channel get images in gray, networks with three get RGB. Networks with any other number of
channels need files with as many bands. Web pages show the first three bands as red, green and blue, or the first alone.

Pixel values are scaled to levels from 0 to 255 by the data type of the file, never by the values themselves, so that
the images of a dataset keep their relative brightness. Types of more than 8 bits become float32 and keep fractions of
a level.
"""

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

SUFFIXES = frozenset({".npy", ".tif", ".tiff"})

# Images with more pixels than this are decoded one at a time to save memory, whatever the number of threads.
LARGE = 8_000_000
_large_image_lock = threading.Lock()

# Floats may lie outside [0, 1] by this much, a fortieth of a level, because of rounding.
TOLERANCE = 1e-4

# Weights of red, green and blue in gray, the same as in Pillow (ITU-R BT.601).
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


class Bands:
    """n gray images of one size that are resized and cropped together.

    It has the few methods of a Pillow image that `image_loading` needs. Either all bands are 8-bit images, or all hold
    levels from 0 to 255 as float32.
    """

    def __init__(self, bands: list[Image.Image]) -> None:
        self._bands = bands
        self.size = bands[0].size
        self.width, self.height = self.size

    @classmethod
    def of(cls, levels: np.ndarray, copies: int = 1) -> "Bands":
        """Create from levels (H, W, n), uint8 or float32; each band is repeated `copies` times."""
        images = [Image.fromarray(np.ascontiguousarray(levels[..., i])) for i in range(levels.shape[-1])]
        return cls([image for image in images for _ in range(copies)])

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> "Bands":
        """Return all bands resized to (width, height)."""
        return self._map(lambda band: band.resize(size, resample))

    def crop(self, box: tuple[int, int, int, int]) -> "Bands":
        """Return the region (left, top, right, bottom) of all bands."""
        return self._map(lambda band: band.crop(box))

    def _map(self, function: Callable[[Image.Image], Image.Image]) -> "Bands":
        """Apply a function to every band; repeated bands are computed once."""
        distinct = {id(band): band for band in self._bands}
        results = {key: function(band) for key, band in distinct.items()}
        return Bands([results[id(band)] for band in self._bands])

    def to_display_image(self) -> Image.Image:
        """Return an 8-bit image for display: the first three bands as RGB, or the first if there are fewer."""
        displayed = self._bands[: 3 if len(self._bands) > 2 else 1]
        bands = Bands(displayed)._map(_to_8_bits)._bands
        return bands[0] if len(bands) == 1 else Image.merge("RGB", bands)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        """Return levels (H, W, n): uint8, or float32 clipped to [0, 255], since interpolation may overshoot."""
        values = np.stack([np.asarray(band) for band in self._bands], axis=-1)
        return values if values.dtype == np.uint8 else values.clip(0, 255)


def _to_8_bits(band: Image.Image) -> Image.Image:
    """Return a copy with 8 bits."""
    if band.mode == "L":
        return band.copy()
    return Image.fromarray(np.asarray(band).clip(0, 255).round().astype(np.uint8))


@contextlib.contextmanager
def decoding(width: int, height: int, max_pixels: int | None) -> Iterator[None]:
    """Context manager in which an image of this size is decoded; large images are decoded one at a time.

    Raises:
        ValueError: If the image has more than `max_pixels` pixels (None: no limit).
    """
    if max_pixels is not None and width * height > max_pixels:
        raise ValueError(f"too large: {width} × {height} pixels; data.max_pixels allows {max_pixels:,}")
    with _large_image_lock if width * height > LARGE else contextlib.nullcontext():
        yield


def to_levels(values: np.ndarray, max_value: int | None = None) -> np.ndarray:
    """Scale pixel values to levels from 0 to 255 by their data type.

    Args:
        values: Booleans, non-negative integers, or floats in [0, 1].
        max_value: Value that becomes 255, for integers; None: the largest value of the array's type. It differs from
            that where the file has fewer bits.

    Returns:
        uint8 if the values are uint8 (unchanged) or booleans, else float32.

    Raises:
        ValueError: For negative integers, floats outside [0, 1], values that are not finite, and other types.
    """
    if values.dtype == np.bool_:
        return values * np.uint8(255)
    if np.issubdtype(values.dtype, np.integer):
        max_value = max_value or int(np.iinfo(values.dtype).max)
        if values.dtype == np.uint8 and max_value == 255:
            return values
        if values.dtype.kind == "i" and values.min() < 0:
            raise ValueError(f"unsupported values: negative integers, down to {values.min()}")
        # float32 represents all integers of 16 bits exactly, float64 those of 32.
        float_type = np.float32 if values.dtype.itemsize <= 2 else np.float64
        return np.multiply(values, float_type(255 / max_value), dtype=float_type).astype(np.float32)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"unsupported values: of type {values.dtype}")
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("unsupported values: NaN or infinity")
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(f"unsupported values: floats from {low:g} to {high:g}, and floats must lie in [0, 1]")
    return (values.astype(np.float32) * 255).clip(0, 255)


def read_bands(path: Path, channels: int, max_pixels: int | None) -> Bands:
    """Read a `.npy` or TIFF file with the given number of bands, on the first or the last axis.

    Raises:
        ValueError: If the file has another suffix, another number of bands, or more than `max_pixels` pixels.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"the network takes {channels} channels, which only {', '.join(sorted(SUFFIXES))} can hold")
    if path.suffix.lower() == ".npy":
        # Memory-mapped, so that the shape is checked before the values are read.
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        with decoding(*_image_size(values.shape, channels), max_pixels):
            return _channels_last(to_levels(np.asarray(values)), channels)
    import tifffile

    with tifffile.TiffFile(path) as opened:
        series = opened.series[0]
        with decoding(*_image_size(series.shape, channels), max_pixels):
            return _channels_last(_tiff_levels(series.asarray(), series.keyframe), channels)


def _image_size(shape: tuple[int, ...], channels: int) -> tuple[int, int]:
    """Return (width, height) of an array of bands."""
    if len(shape) != 3 or channels not in (shape[0], shape[-1]):
        raise ValueError(f"an array of {shape} is no picture of {channels} bands")
    return (shape[1], shape[0]) if shape[-1] == channels else (shape[2], shape[1])


def _channels_last(levels: np.ndarray, channels: int) -> Bands:
    return Bands.of(levels if levels.shape[-1] == channels else levels.transpose(1, 2, 0))


def _tiff_levels(values: np.ndarray, page: object) -> np.ndarray:
    """Scale what tifffile read from a page to levels, by its number of bits; inverted where 0 is white."""
    max_value = None
    if np.issubdtype(values.dtype, np.integer):
        max_value = 2 ** (int(page.bitspersample) - (values.dtype.kind == "i")) - 1  # type: ignore[attr-defined]
    levels = to_levels(values, max_value)
    return 255 - levels if page.photometric == 0 else levels  # type: ignore[attr-defined]


def read_tiff(file: IO[bytes], channels: int, max_pixels: int | None) -> Bands:
    """Read the first page of a gray or RGB TIFF that Pillow does not support, such as floats in RGB or of 64 bits.

    Raises:
        ValueError: If the page is neither gray nor RGB, or has more than `max_pixels` pixels.
    """
    import tifffile

    with tifffile.TiffFile(file) as opened:
        page = opened.pages.first
        with decoding(page.imagewidth, page.imagelength, max_pixels):
            values = page.asarray()
        values = values.transpose(1, 2, 0) if page.axes == "SYX" else values
        values = values[..., None] if values.ndim == 2 else values
        if values.ndim != 3 or (values.shape[-1], int(page.photometric)) not in ((1, 0), (1, 1), (3, 2)):
            raise ValueError(f"unsupported values: {page.axes} {values.shape} of type {values.dtype} in a TIFF")
        levels = _tiff_levels(values, page)
        if channels == 1 and levels.shape[-1] == 3:
            levels = (levels @ LUMA)[..., None]
        return Bands.of(levels, channels // levels.shape[-1])


def to_png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def to_display_image(pixels: np.ndarray) -> Image.Image:
    """Return (H, W, C) uint8 pixels as an image for display.

    One channel becomes gray, two channels the first in gray, three RGB, and more the first three as RGB.
    """
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3]))
