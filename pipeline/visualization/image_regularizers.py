"""Image regularizers: losses of the image that are minimized while the objective is maximized.

Regularizers are sums over pixels, as in lucid, so that the gradient of a pixel does not depend on the size of the
image. With `relative` (the default) the weight is relative to the objective: it holds for an objective whose gradient
has a root mean square of 1 over the pixels of the image. Activations have no common unit, and a weight that suits one
layer would be far too large or too small for another. With `relative: false` the weight multiplies the sum itself, as
in lucid.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.core.registry import Registry
from pipeline.data.image_filters import blur, frequencies

PENALTIES = Registry("penalty")


@dataclasses.dataclass(frozen=True)
class ImageRegularizer:
    """Base class of image regularizers.

    Attributes:
        weight: Factor of the loss.
        relative: Whether the weight is relative to the gradient of the objective.
        anchored: Whether the regularizer compares with the initial image.
    """

    weight: float
    relative: bool = True

    anchored: ClassVar[bool] = False

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the loss of each image.

        Args:
            images: (B, C, H, W) in [0, 1].
            reference: (B, C, H, W) initial images; only valid for regularizers that are `anchored`.

        Returns:
            (B,) sums over pixels, at least 0.
        """
        raise NotImplementedError


@PENALTIES.add("tv")
@dataclasses.dataclass(frozen=True)
class TotalVariation(ImageRegularizer):
    """Sum of |d| over the differences d of neighbors, down and right (lucid `total_variation`).

    Mahendran & Vedaldi 2015 with β = 1. |d| is computed as sqrt(d² + softness²) - softness, whose gradient is
    continuous at 0.
    """

    weight: float = 1.0
    softness: float = 1e-3

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the total variation, (B,)."""
        down = images[..., 1:, :] - images[..., :-1, :]
        right = images[..., :, 1:] - images[..., :, :-1]
        soft = self.softness
        vertical = (down.pow(2) + soft**2).sqrt().sub(soft).sum(dim=(1, 2, 3))
        horizontal = (right.pow(2) + soft**2).sqrt().sub(soft).sum(dim=(1, 2, 3))
        return vertical + horizontal


@PENALTIES.add("l1")
@dataclasses.dataclass(frozen=True)
class L1(ImageRegularizer):
    """Sum of |x - grey| (lucid `L1`, constant 0.5)."""

    weight: float = 0.05
    grey: float = 0.5

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the sum of absolute distances, (B,)."""
        return (images - self.grey).abs().sum(dim=(1, 2, 3))


@PENALTIES.add("l2")
@dataclasses.dataclass(frozen=True)
class L2(ImageRegularizer):
    """Sum of (x - grey)²: the square of lucid's `L2`, so that the gradient grows with the distance."""

    weight: float = 0.5
    grey: float = 0.5

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the sum of squared distances, (B,)."""
        return (images - self.grey).pow(2).sum(dim=(1, 2, 3))


@PENALTIES.add("lp")
@dataclasses.dataclass(frozen=True)
class Lp(ImageRegularizer):
    """Sum of |2 (x - grey)|^power: weak near grey, strong near black and white.

    Mahendran & Vedaldi 2015 use power 6.
    """

    weight: float = 0.1
    grey: float = 0.5
    power: float = 6.0

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the sum of powers, (B,)."""
        return (2 * (images - self.grey)).abs().pow(self.power).sum(dim=(1, 2, 3))


@PENALTIES.add("blur")
@dataclasses.dataclass(frozen=True)
class BlurDistance(ImageRegularizer):
    """Half the sum of squared distances to the blurred image (lucid `blur_input_each_step`).

    Minimizing it blurs the image slightly at each step, by way of the optimizer. `sigma` is in pixels.
    """

    weight: float = 1.0
    sigma: float = 1.0

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return half the sum of squared distances, (B,)."""
        return 0.5 * (images - blur(images, self.sigma)).pow(2).sum(dim=(1, 2, 3))


@PENALTIES.add("high_frequency")
@dataclasses.dataclass(frozen=True)
class HighFrequency(ImageRegularizer):
    """Energy above `cutoff` cycles per pixel, of the orthonormal Fourier transform (a sum over pixels, by Parseval)."""

    weight: float = 1.0
    cutoff: float = 0.25

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the energy, (B,)."""
        height, width = images.shape[-2:]
        spectrum = torch.fft.rfft2(images, norm="ortho")
        energy = spectrum.real.pow(2) + spectrum.imag.pow(2)
        # Each column of the half spectrum stands for two, except the first and, for an even width, the Nyquist column.
        multiplicity = torch.full((width // 2 + 1,), 2.0, dtype=images.dtype, device=images.device)
        multiplicity[0] = 1.0
        if width % 2 == 0:
            multiplicity[-1] = 1.0
        is_high = frequencies(height, width, device=images.device) > self.cutoff
        return (energy * (is_high * multiplicity)).sum(dim=(1, 2, 3))


@PENALTIES.add("prior")
@dataclasses.dataclass(frozen=True)
class Prior(ImageRegularizer):
    """Half the sum of squared distances to the initial image."""

    weight: float = 0.1

    anchored: ClassVar[bool] = True

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return half the sum of squared distances, (B,)."""
        return 0.5 * (images - reference).pow(2).sum(dim=(1, 2, 3))
