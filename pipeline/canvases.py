"""How a picture is parameterised: numbers that the optimiser moves → an image in [0, 1].

A canvas is pure mathematics: `start` draws the first numbers of one picture from its own generator (so that
a unit's start never depends on its batch), `image` turns a batch of them into images.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import torch
from torch import Generator, Tensor

from pipeline.registry import Registry

CANVASES = Registry("canvas")

# Colour covariance of ImageNet, as a square root: lucid/optvis/param/color.py, divided by its largest row norm.
# Rows are R, G, B; columns are the decorrelated axes (lightness, blue–orange, green–magenta).
COLOUR = (
    (0.5628, 0.1948, 0.0433),
    (0.5845, 0.0000, -0.1082),
    (0.5845, -0.1948, 0.0649),
)


@runtime_checkable
class Canvas(Protocol):
    """What `render` needs of a canvas."""

    def start(self, generator: Generator, channels: int, size: int) -> Tensor:
        """The first parameters of one picture of `size` × `size` pixels."""
        ...

    def image(self, parameters: Tensor, size: int) -> Tensor:
        """(B, …) parameters → (B, C, size, size) in [0, 1]."""
        ...


def colour(image: Tensor, decorrelated: bool) -> Tensor:
    """(B, C, H, W) of any range → [0, 1]: mixed into RGB if there are three channels, then a sigmoid."""
    if decorrelated and image.shape[1] == 3:
        matrix = image.new_tensor(COLOUR)
        image = torch.einsum("rc,bchw->brhw", matrix, image)
    return torch.sigmoid(image)


def frequencies(size: int, device: torch.device | None = None) -> Tensor:
    """(size, size // 2 + 1) spatial frequencies of a real 2-D spectrum, in cycles per pixel."""
    rows = torch.fft.fftfreq(size, device=device)[:, None]
    columns = torch.fft.rfftfreq(size, device=device)[None, :]
    return torch.sqrt(rows * rows + columns * columns)


@CANVASES.add("pixel")
@dataclasses.dataclass(frozen=True)
class Pixel:
    """One number a pixel and channel: the naive canvas, which favours high frequencies."""

    sd: float = 0.01
    decorrelated: bool = False

    def start(self, generator: Generator, channels: int, size: int) -> Tensor:
        """(C, H, W) Gaussian noise of standard deviation `sd`."""
        return torch.randn(channels, size, size, generator=generator) * self.sd

    def image(self, parameters: Tensor, size: int) -> Tensor:
        """(B, C, H, W) → (B, C, H, W) in [0, 1]."""
        return colour(parameters, self.decorrelated)


@CANVASES.add("fourier")
@dataclasses.dataclass(frozen=True)
class Fourier:
    """A spectrum scaled by 1/f^decay, so that equal steps change all scales of a natural image alike.

    Olah, Mordvintsev & Schubert 2017, "Preconditioning and Parameterization"; constants of
    lucid/optvis/param/spatial.py (sd 0.01, decay 1, and its division by 4 as `gain`).
    """

    sd: float = 0.01
    decay: float = 1.0
    gain: float = 0.25
    decorrelated: bool = True

    def start(self, generator: Generator, channels: int, size: int) -> Tensor:
        """(C, H, W // 2 + 1, 2) real and imaginary parts, Gaussian of standard deviation `sd`."""
        return torch.randn(channels, size, size // 2 + 1, 2, generator=generator) * self.sd

    def image(self, parameters: Tensor, size: int) -> Tensor:
        """(B, C, H, W // 2 + 1, 2) → (B, C, H, W) in [0, 1]."""
        scale = frequencies(size, parameters.device).clamp(min=1 / size) ** -self.decay
        spectrum = torch.view_as_complex(parameters.float() * scale[..., None])
        # norm="ortho" is lucid's inverse transform times its factor sqrt(h·w).
        image = torch.fft.irfft2(spectrum, s=(size, size), norm="ortho")
        return colour(image * self.gain, self.decorrelated)
