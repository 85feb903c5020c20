"""What photographs have in common: their mean amplitude spectrum and the covariance of their colours.

Measured on the user's own photographs by `atlas spectrum`, kept as a small .npz, used by the `maco` canvas
(amplitudes) and by `colour: measured` (colours). The one that comes with the package was measured on the sample
photographs by the same command.
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

EDGE = 1 / 64


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """`amplitude` (C, S, S // 2 + 1) in colour-decorrelated logit space, orthonormal transform; `colour` (C, C).

    `mean` (C,) is the signed mean of the same space: the amplitude at frequency 0.
    """

    amplitude: np.ndarray
    colour: np.ndarray
    mean: np.ndarray

    @classmethod
    def of(cls, file: ConfigFile) -> "Spectrum":
        """From a file that `atlas spectrum` wrote; anything else is an `AtlasError`."""
        arrays = file.arrays()
        if set(arrays) != {"amplitude", "colour", "mean"}:
            raise AtlasError(f"{file.path} is not a spectrum: `atlas spectrum data.root=… out=…` makes one.")
        return cls(**{name: array.astype(np.float32) for name, array in arrays.items()})

    def content(self) -> bytes:
        """As the bytes of an .npz, half precision for the amplitudes: they span four orders of magnitude, not more."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, amplitude=self.amplitude.astype(np.float16), colour=self.colour, mean=self.mean)
        return buffer.getvalue()

    def at(self, height: int, width: int) -> Tensor:
        """(C, height, width // 2 + 1) amplitudes for images of another size.

        Looked up at the same frequency in cycles per pixel (nearest; in an orthonormal transform a texture's
        amplitude there does not depend on the size); frequency 0 is the mean, which does.
        """
        side = self.amplitude.shape[1]
        rows = np.rint(np.fft.fftfreq(height) * side).astype(int) % side
        columns = np.minimum(np.rint(np.fft.rfftfreq(width) * side).astype(int), self.amplitude.shape[2] - 1)
        found = self.amplitude[:, rows][:, :, columns].copy()
        # Frequencies nearer to 0 than the first one measured are not the mean: give them the first one's amplitude.
        first = (self.amplitude[:, 0, 1] + self.amplitude[:, 1, 0]) / 2
        low = (rows[:, None] == 0) & (columns[None, :] == 0)
        found[:, low] = first[:, None]
        found[:, 0, 0] = np.abs(self.mean) * np.sqrt(height * width)
        return torch.from_numpy(found)


@functools.cache
def packaged() -> Spectrum:
    """The spectrum that comes with the package: colour photographs of the sample kind."""
    path = Path(__file__).with_name("natural_spectrum.npz")
    return Spectrum.of(ConfigFile(path.name, path.read_bytes()))


def measure(images: Iterable[np.ndarray]) -> Spectrum:
    """The spectrum of (C, S, S) uint8 photographs, all of one size.

    Colours: square root of the covariance of all pixels, divided by its largest row norm, as lucid's constant is
    (lucid/optvis/param/color.py). Amplitudes: mean of |FFT| after the inverse squash (logit, values kept 1/64 off
    both ends) and the inverse colour matrix: exactly what the `maco` canvas turns back into an image.
    """
    kept = [torch.from_numpy(np.ascontiguousarray(image)).float().div(255) for image in images]
    if len(kept) < 2:
        raise AtlasError("A spectrum needs at least 2 photographs.")
    pixels = torch.cat([image.flatten(1) for image in kept], dim=1).double()
    values, vectors = torch.linalg.eigh(torch.cov(pixels).reshape(pixels.shape[0], -1))
    # Columns by falling variance: lightness first.
    root = (vectors * values.clamp(min=1e-8).sqrt()).flip(1)
    root = root * torch.where(root.sum(0) < 0, -1.0, 1.0)
    colour = (root / root.norm(dim=1).max()).float()
    inverse = torch.linalg.inv(colour)
    total, mean = torch.zeros(()), torch.zeros(colour.shape[0])
    for image in kept:
        plain = torch.einsum("rc,chw->rhw", inverse, torch.logit(image.clamp(EDGE, 1 - EDGE)))
        level = plain.mean(dim=(1, 2))
        total = total + torch.fft.rfft2(plain - level[:, None, None], norm="ortho").abs()
        mean = mean + level
    return Spectrum((total / len(kept)).numpy(), colour.numpy(), (mean / len(kept)).numpy())
