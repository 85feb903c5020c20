"""Gaussian blur and spatial frequencies of batches of images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_kernels(sigma: Tensor, radius: int) -> Tensor:
    """Return one-dimensional Gaussian kernels that sum to 1.

    Args:
        sigma: (B,) standard deviations in pixels; 0 is the identity.
        radius: Largest distance from the center in pixels.

    Returns:
        (B, 2·radius + 1) weights.
    """
    offsets = torch.arange(-radius, radius + 1, dtype=sigma.dtype, device=sigma.device)
    # The lower bound avoids a division by 0; at a twentieth of a pixel the neighbors' weights are 0 already.
    weights = torch.exp(-0.5 * (offsets / sigma.clamp(min=0.05)[:, None]) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)


def blur(images: Tensor, sigma: Tensor | float, max_sigma: float | None = None) -> Tensor:
    """Blur images by a Gaussian, with reflected edges.

    Args:
        images: (B, C, H, W).
        sigma: Standard deviation in pixels: one for all images, or (B,).
        max_sigma: Upper bound of a (B,) `sigma`. It sets the size of the kernel, which otherwise has to be read back
            from the device.

    Returns:
        (B, C, H, W).
    """
    batch, channels, height, width = images.shape
    if not isinstance(sigma, Tensor):
        max_sigma = sigma
        sigma = images.new_full((batch,), sigma)
    largest = float(sigma.max()) if max_sigma is None else max_sigma
    if largest <= 0:
        return images
    radius = min(math.ceil(3 * largest), height - 1, width - 1)
    weights = gaussian_kernels(sigma, radius).repeat_interleave(channels, dim=0)
    flat = images.reshape(1, batch * channels, height, width)
    flat = F.pad(flat, (radius, radius, radius, radius), mode="reflect")
    flat = F.conv2d(flat, weights[:, None, :, None], groups=batch * channels)
    flat = F.conv2d(flat, weights[:, None, None, :], groups=batch * channels)
    return flat.reshape(images.shape)


def frequencies(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return the (height, width // 2 + 1) spatial frequencies of a real 2-D spectrum, in cycles per pixel."""
    rows = torch.fft.fftfreq(height, device=device)[:, None]
    columns = torch.fft.rfftfreq(width, device=device)[None, :]
    return torch.sqrt(rows * rows + columns * columns)


def rms(images: Tensor) -> Tensor:
    """Return the root mean square of each image: (B, …) → (B, 1, …)."""
    return images.pow(2).mean(dim=tuple(range(1, images.ndim)), keepdim=True).sqrt()
