"""Statistics of natural images: their mean amplitude spectrum and the covariance of their colors.

`atlas spectrum` measures them on a dataset and writes a small .npz. The `maco` parameterization uses the amplitudes,
and `colour: measured` the colors. The file in this package was measured on the sample images with the same command.
"""

import dataclasses
import functools
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError

# Pixel values are clipped to [LOGIT_MARGIN, 1 − LOGIT_MARGIN] before the logit, which is infinite at 0 and 1.
LOGIT_MARGIN = 1 / 64


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Mean amplitude spectrum and color statistics of images with C channels.

    Attributes:
        amplitude: Mean of |FFT|, (C, S, S // 2 + 1), of the color-decorrelated logits of pixels, with the orthonormal
            transform.
        colour: Square root of the color covariance, (C, C), divided by its largest column norm; see `measure_spectrum`.
        mean: Signed mean of the color-decorrelated logits, (C,). It determines the amplitude at frequency 0.
    """

    amplitude: np.ndarray
    colour: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, file: ConfigFile) -> "Spectrum":
        """Load a file that `atlas spectrum` wrote.

        Raises:
            AtlasError: If the file contains anything else.
        """
        arrays = file.arrays()
        if set(arrays) != {"amplitude", "colour", "mean"}:
            raise AtlasError(f"{file.path} is not a spectrum. Create one with `atlas spectrum data.root=… out=…`.")
        return cls(**{name: array.astype(np.float32) for name, array in arrays.items()})._normalized()

    def _normalized(self) -> "Spectrum":
        """Return the same statistics with the color matrix divided by its largest column norm, as in lucid.

        Files of earlier versions were divided by the largest row norm. What is decorrelated by the inverse matrix, the
        amplitudes and the mean, scales by the same factor, so that the colors of images do not change.
        """
        scale = np.linalg.norm(self.colour, axis=0).max()
        return Spectrum(self.amplitude * scale, self.colour / scale, self.mean * scale)

    def content(self) -> bytes:
        """Return the bytes of an .npz. Amplitudes span only four orders of magnitude, so that float16 suffices."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, amplitude=self.amplitude.astype(np.float16), colour=self.colour, mean=self.mean)
        return buffer.getvalue()

    def at(self, height: int, width: int) -> Tensor:
        """Return the amplitudes for images of another size, (C, height, width // 2 + 1).

        Each is taken from the nearest measured frequency in cycles per pixel: with the orthonormal transform, the
        amplitude of a texture at a frequency does not depend on the image size. Frequency 0 is the mean, whose
        amplitude grows with the square root of the number of pixels.
        """
        side = self.amplitude.shape[1]
        rows = np.rint(np.fft.fftfreq(height) * side).astype(int) % side
        columns = np.minimum(np.rint(np.fft.rfftfreq(width) * side).astype(int), self.amplitude.shape[2] - 1)
        amplitudes = self.amplitude[:, rows][:, :, columns].copy()
        # Frequencies that round to 0 are not the mean: give them the amplitude of the lowest measured frequency.
        lowest = (self.amplitude[:, 0, 1] + self.amplitude[:, 1, 0]) / 2
        rounds_to_zero = (rows[:, None] == 0) & (columns[None, :] == 0)
        amplitudes[:, rounds_to_zero] = lowest[:, None]
        amplitudes[:, 0, 0] = np.abs(self.mean) * np.sqrt(height * width)
        return torch.from_numpy(amplitudes)


@functools.cache
def packaged_spectrum() -> Spectrum:
    """Return the spectrum in this package, measured on the sample images."""
    path = Path(__file__).with_name("natural_spectrum.npz")
    return Spectrum.of(ConfigFile(path.name, path.read_bytes()))


def measure_spectrum(images: Iterable[np.ndarray]) -> Spectrum:
    """Measure the spectrum of images (C, S, S), uint8, all of one size.

    Colors: the square root of the covariance of all pixels, divided by its largest column norm, as lucid's
    `color_correlation_normalized` (lucid/optvis/param/color.py).
    Amplitudes: the mean of |FFT| of the images after the inverse sigmoid (logit, with values clipped to
    [`LOGIT_MARGIN`, 1 − `LOGIT_MARGIN`]) and the inverse color matrix: the `maco` parameterization inverts both.

    Raises:
        AtlasError: If there are fewer than 2 images.
    """
    tensors = [torch.from_numpy(np.ascontiguousarray(image)).float().div(255) for image in images]
    if len(tensors) < 2:
        raise AtlasError("A spectrum needs at least 2 images.")
    pixels = torch.cat([image.flatten(1) for image in tensors], dim=1).double()
    values, vectors = torch.linalg.eigh(torch.cov(pixels).reshape(pixels.shape[0], -1))
    # Columns in order of decreasing variance: lightness first.
    root = (vectors * values.clamp(min=1e-8).sqrt()).flip(1)
    root = root * torch.where(root.sum(0) < 0, -1.0, 1.0)
    colour = (root / root.norm(dim=0).max()).float()
    inverse = torch.linalg.inv(colour)
    total, mean = torch.zeros(()), torch.zeros(colour.shape[0])
    for image in tensors:
        decorrelated = torch.einsum("rc,chw->rhw", inverse, torch.logit(image.clamp(LOGIT_MARGIN, 1 - LOGIT_MARGIN)))
        channel_mean = decorrelated.mean(dim=(1, 2))
        total = total + torch.fft.rfft2(decorrelated - channel_mean[:, None, None], norm="ortho").abs()
        mean = mean + channel_mean
    return Spectrum((total / len(tensors)).numpy(), colour.numpy(), (mean / len(tensors)).numpy())
