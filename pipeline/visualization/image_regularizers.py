"""What is discouraged: a number per image, to be brought down while the objective is brought up.

Penalties are sums over pixels, as in lucid, so that each pixel feels the same pull whatever the canvas. With
`relative` (the default) the weight is measured against the objective: the objective's gradient is taken per image
as if its root mean square over pixels were 1. An activation has no unit, and a weight that suits one layer would
drown or vanish in another. With `relative: false` it multiplies the bare sum, as lucid's weights do.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.core.registry import Registry
from pipeline.visualization.filters import blur, frequencies

PENALTIES = Registry("penalty")


@dataclasses.dataclass(frozen=True)
class ImageRegularizer:
    """What `render` needs of a penalty."""

    weight: float
    relative: bool = True

    # True for a penalty that compares with the picture that the canvas started from.
    anchored: ClassVar[bool] = False

    def value(self, images: Tensor, first: Tensor) -> Tensor:
        """(B, C, H, W) images in [0, 1], and those that they started from → (B,) sums over pixels, never negative."""
        raise NotImplementedError


@PENALTIES.add("tv")
@dataclasses.dataclass(frozen=True)
class TotalVariation(ImageRegularizer):
    """Sum of |differences| of neighbours, down and right (Mahendran & Vedaldi 2015, β = 1; lucid `total_variation`).

    `softness` rounds the corner of |d|, as sqrt(d² + softness²), that a gradient may settle.
    """

    weight: float = 0.25
    softness: float = 1e-3

    def value(self, images: Tensor, first: Tensor) -> Tensor:
        """Total variation, (B,)."""
        down = images[..., 1:, :] - images[..., :-1, :]
        right = images[..., :, 1:] - images[..., :, :-1]
        soft = self.softness
        return sum((d.pow(2) + soft**2).sqrt().sub(soft).sum(dim=(1, 2, 3)) for d in (down, right))  # type: ignore[return-value]


@PENALTIES.add("l1")
@dataclasses.dataclass(frozen=True)
class L1(ImageRegularizer):
    """Sum of |x - grey| (lucid `L1`, constant 0.5)."""

    weight: float = 0.05
    grey: float = 0.5

    def value(self, images: Tensor, first: Tensor) -> Tensor:
        """Sum of absolute distances, (B,)."""
        return (images - self.grey).abs().sum(dim=(1, 2, 3))


@PENALTIES.add("l2")
@dataclasses.dataclass(frozen=True)
class L2(ImageRegularizer):
    """Sum of (x - grey)²: the square of lucid's `L2`, so that the pull grows with the distance."""

    weight: float = 0.05
    grey: float = 0.5

    def value(self, images: Tensor, first: Tensor) -> Tensor:
        """Sum of squared distances, (B,)."""
        return (images - self.grey).pow(2).sum(dim=(1, 2, 3))


@PENALTIES.add("lp")
@dataclasses.dataclass(frozen=True)
class Lp(ImageRegularizer):
    """Sum of |2 (x - grey)|^power: hardly felt near grey, strong near black and white.

    Mahendran & Vedaldi 2015 use power 6.
    """

    weight: float = 0.05
    grey: float = 0.5
    power: float = 6.0

    def value(self, images: Tensor, first: Tensor) -> Tensor:
        """Sum of powers, (B,)."""
        return (2 * (images - self.grey)).abs().pow(self.power).sum(dim=(1, 2, 3))


@PENALTIES.add("blur")
@dataclasses.dataclass(frozen=True)
class BlurDistance(ImageRegularizer):
    """Half the sum of squared distances to the picture's own blur (lucid `blur_input_each_step`).

    Minimising it is blurring a little at each step, without ever leaving the optimiser.
    """

    weight: float = 1.0
    sigma: float = 1.0

    def value(self, images: Tensor, first: Tensor) -> Tensor:
        """Sum of squared distances over 2, (B,)."""
        return 0.5 * (images - blur(images, self.sigma)).pow(2).sum(dim=(1, 2, 3))


@PENALTIES.add("high_frequency")
@dataclasses.dataclass(frozen=True)
class HighFrequency(ImageRegularizer):
    """Energy above `cutoff` cycles per pixel, by the orthonormal Fourier transform (Parseval: a sum over pixels)."""

    weight: float = 1.0
    cutoff: float = 0.25

    def value(self, images: Tensor, first: Tensor) -> Tensor:
        """Energy, (B,)."""
        height, width = images.shape[-2:]
        spectrum = torch.fft.rfft2(images, norm="ortho")
        energy = spectrum.real.pow(2) + spectrum.imag.pow(2)
        # All columns of the half spectrum stand for two, but the first and, where there is one, the Nyquist column.
        twice = torch.full((width // 2 + 1,), 2.0, dtype=images.dtype, device=images.device)
        twice[0] = 1.0
        if width % 2 == 0:
            twice[-1] = 1.0
        above = frequencies(height, width, device=images.device) > self.cutoff
        return (energy * (above * twice)).sum(dim=(1, 2, 3))


@PENALTIES.add("prior")
@dataclasses.dataclass(frozen=True)
class Prior(ImageRegularizer):
    """Half the sum of squared distances to the picture that the canvas started from."""

    weight: float = 0.1

    anchored: ClassVar[bool] = True

    def value(self, images: Tensor, first: Tensor) -> Tensor:
        """Sum of squared distances over 2, (B,)."""
        return 0.5 * (images - first).pow(2).sum(dim=(1, 2, 3))
