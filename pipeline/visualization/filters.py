"""Gaussian blur and spectra of batches of images: what canvases, transforms and penalties share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def kernels(sigma: Tensor, radius: int) -> Tensor:
    """(B,) standard deviations in pixels → (B, 2·radius + 1) Gaussian kernels that sum to 1.

    A sigma of 0 is the identity.
    """
    at = torch.arange(-radius, radius + 1, dtype=sigma.dtype, device=sigma.device)
    # Below a twentieth of a pixel nothing of the neighbours is left, and the division is safe.
    weights = torch.exp(-0.5 * (at / sigma.clamp(min=0.05)[:, None]) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)


def blur(images: Tensor, sigma: Tensor | float, most: float | None = None) -> Tensor:
    """(B, C, H, W) blurred by a Gaussian of `sigma` pixels, one for all or (B,) one each; edges are reflected.

    `most` bounds the sigmas, so that the kernel's size need not be read back from the device.
    """
    batch, channels, height, width = images.shape
    if not isinstance(sigma, Tensor):
        most = sigma
        sigma = images.new_full((batch,), sigma)
    largest = float(sigma.max()) if most is None else most
    if largest <= 0:
        return images
    radius = min(math.ceil(3 * largest), height - 1, width - 1)
    taps = kernels(sigma, radius).repeat_interleave(channels, dim=0)
    flat = images.reshape(1, batch * channels, height, width)
    flat = F.pad(flat, (radius, radius, radius, radius), mode="reflect")
    flat = F.conv2d(flat, taps[:, None, :, None], groups=batch * channels)
    flat = F.conv2d(flat, taps[:, None, None, :], groups=batch * channels)
    return flat.reshape(images.shape)


def frequencies(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """(height, width // 2 + 1) spatial frequencies of a real 2-D spectrum, in cycles per pixel."""
    rows = torch.fft.fftfreq(height, device=device)[:, None]
    columns = torch.fft.rfftfreq(width, device=device)[None, :]
    return torch.sqrt(rows * rows + columns * columns)


def rms(images: Tensor) -> Tensor:
    """(B, …) → (B, 1, …) root mean square of each image."""
    return images.pow(2).mean(dim=tuple(range(1, images.ndim)), keepdim=True).sqrt()
