"""Preconditioners of the gradient in pixel space, applied before it is propagated to the parameters.

Olah, Mordvintsev & Schubert 2017, "Preconditioning and Parameterization": gradients have strong high
frequencies, and the direction of steepest ascent depends on how distance is measured.
"""

import dataclasses

import torch
from torch import Tensor

from pipeline.core.registry import Registry
from pipeline.data.image_filters import blur, frequencies, rms

PRECONDITIONERS = Registry("preconditioner")


@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """Base class of gradient preconditioners."""

    def apply(self, gradient: Tensor, sigma: float | None) -> Tensor:
        """Return the preconditioned gradient.

        Args:
            gradient: (B, C, H, W) gradient of the loss in the image.
            sigma: `gradient_blur` of the schedule at this step in pixels; None if the schedule has none.

        Returns:
            (B, C, H, W).
        """
        raise NotImplementedError


@PRECONDITIONERS.add("blur")
@dataclasses.dataclass(frozen=True)
class BlurGradient(Preconditioner):
    """Blur the gradient by a Gaussian of `sigma` pixels; `gradient_blur` of a schedule replaces `sigma`."""

    sigma: float = 2.0

    def apply(self, gradient: Tensor, sigma: float | None) -> Tensor:
        """Return the blurred gradient, (B, C, H, W)."""
        return blur(gradient, self.sigma if sigma is None else sigma)


@PRECONDITIONERS.add("spectrum")
@dataclasses.dataclass(frozen=True)
class ScaleSpectrum(Preconditioner):
    """Divide each frequency of the gradient by f^power, with f in cycles per image and at least 1."""

    power: float = 1.0

    def apply(self, gradient: Tensor, sigma: float | None) -> Tensor:
        """Return the scaled gradient, (B, C, H, W)."""
        size = (gradient.shape[-2], gradient.shape[-1])
        scale = (frequencies(*size, device=gradient.device) * max(size)).clamp(min=1.0) ** -self.power
        return torch.fft.irfft2(torch.fft.rfft2(gradient) * scale, s=size)


@PRECONDITIONERS.add("normalise")
@dataclasses.dataclass(frozen=True)
class Normalise(Preconditioner):
    """Divide the gradient of each image by its root mean square; a zero gradient stays zero."""

    def apply(self, gradient: Tensor, sigma: float | None) -> Tensor:
        """Return the gradient with a root mean square of 1, (B, C, H, W)."""
        return gradient / rms(gradient).clamp(min=torch.finfo(gradient.dtype).tiny)


@PRECONDITIONERS.add("sign")
@dataclasses.dataclass(frozen=True)
class Sign(Preconditioner):
    """Keep the sign of each value of the gradient: the direction of steepest ascent in the L∞ metric.

    Goodfellow, Shlens & Szegedy, "Explaining and Harnessing Adversarial Examples", 2015, section 4; one of the three
    metrics that Olah et al. 2017 compare.
    """

    def apply(self, gradient: Tensor, sigma: float | None) -> Tensor:
        """Return the signs, (B, C, H, W) in {−1, 0, 1}."""
        return gradient.sign()
