"""Pictures of any number of channels: satellite bands, stained tissue, stacks; read from TIFF or NumPy files.

A network of one channel sees photographs in grey and one of three in RGB. Every other number of channels needs
files that have as many bands. Pages show the first three bands as red, green and blue, or the first one alone.
"""

from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = frozenset({".npy", ".tif", ".tiff"})


class Bands:
    """n grey images of one size that resize and crop together, with the few methods of an image that `photos` needs."""

    def __init__(self, bands: list[Image.Image]) -> None:
        self._bands = bands
        self.size = bands[0].size
        self.width, self.height = self.size

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> "Bands":
        """All bands at another (width, height)."""
        return Bands([band.resize(size, resample) for band in self._bands])

    def crop(self, box: tuple[int, int, int, int]) -> "Bands":
        """The (left, top, right, bottom) part of all bands."""
        return Bands([band.crop(box) for band in self._bands])

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        """(H, W, n) uint8."""
        return np.stack([np.asarray(band) for band in self._bands], axis=-1)


def read(path: Path, channels: int) -> Bands:
    """A file of `channels` bands, first or last axis, as 8-bit bands.

    Whole numbers are scaled by the range of their type, floating-point numbers are taken to be in [0, 1]. Raises
    ValueError for another file or another number of bands.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"the network takes {channels} channels, which only {', '.join(sorted(SUFFIXES))} can hold")
    if path.suffix.lower() == ".npy":
        values = np.load(path, allow_pickle=False)
    else:
        import tifffile

        values = tifffile.imread(path)
    if values.ndim != 3 or channels not in (values.shape[0], values.shape[-1]):
        raise ValueError(f"an array of {values.shape} is no picture of {channels} bands")
    if values.shape[-1] != channels:
        values = values.transpose(1, 2, 0)
    if np.issubdtype(values.dtype, np.integer):
        values = values.astype(np.float32) / np.iinfo(values.dtype).max
    whole = (np.nan_to_num(values.astype(np.float32)).clip(0, 1) * 255).round().astype(np.uint8)
    return Bands([Image.fromarray(np.ascontiguousarray(whole[..., i])) for i in range(channels)])


def visible(pixels: np.ndarray) -> Image.Image:
    """(H, W, C) uint8 as a page shows it: grey, RGB, or the first three bands (the first, if there are two)."""
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[-1] < 3 else pixels[..., :3]))
