"""What is done to the gradient in pixel space, before the canvas takes it over: a change of metric.

Olah, Mordvintsev & Schubert 2017, "Preconditioning and Parameterization": gradients have strong high
frequencies, and the direction of steepest ascent depends on how distance is measured.
"""

import dataclasses

import torch
from torch import Tensor

from pipeline.core.registry import Registry
from pipeline.visualization.filters import blur, frequencies, rms

PRECONDITIONERS = Registry("preconditioner")


@dataclasses.dataclass(frozen=True)
class Preconditioner:
    """What `render` needs of a preconditioner."""

    def apply(self, gradient: Tensor, sigma: float | None) -> Tensor:
        """(B, C, H, W) gradient of the image → (B, C, H, W); `sigma` is the schedule's blur of gradients, if any."""
        raise NotImplementedError


@PRECONDITIONERS.add("blur")
@dataclasses.dataclass(frozen=True)
class BlurGradient(Preconditioner):
    """The gradient blurred by a Gaussian of `sigma` pixels; a schedule's `gradient_blur` takes its place."""

    sigma: float = 2.0

    def apply(self, gradient: Tensor, sigma: float | None) -> Tensor:
        """Blurred, (B, C, H, W)."""
        return blur(gradient, self.sigma if sigma is None else sigma)


@PRECONDITIONERS.add("spectrum")
@dataclasses.dataclass(frozen=True)
class ScaleSpectrum(Preconditioner):
    """Each frequency of the gradient divided by f^power, f in cycles per picture and at least 1."""

    power: float = 1.0

    def apply(self, gradient: Tensor, sigma: float | None) -> Tensor:
        """Scaled, (B, C, H, W)."""
        size = (gradient.shape[-2], gradient.shape[-1])
        scale = (frequencies(*size, device=gradient.device) * max(size)).clamp(min=1.0) ** -self.power
        return torch.fft.irfft2(torch.fft.rfft2(gradient) * scale, s=size)


@PRECONDITIONERS.add("normalise")
@dataclasses.dataclass(frozen=True)
class Normalise(Preconditioner):
    """Each image's gradient divided by its own root mean square; a zero gradient stays zero."""

    def apply(self, gradient: Tensor, sigma: float | None) -> Tensor:
        """Of root mean square 1, (B, C, H, W)."""
        return gradient / rms(gradient).clamp(min=torch.finfo(gradient.dtype).tiny)
