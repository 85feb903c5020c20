"""Transparency masks of feature visualizations: which pixels the optimization cared about.

Fel et al. 2023, "Unlocking Feature Visualization for Deeper Networks with MAgnitude Constrained Optimization" (arXiv
2306.06805), section "Transparency for free": the sum over the optimization steps of the absolute gradient of the
objective with respect to the image. Where it is small, the objective hardly depends on the pixel, whatever is seen
there. `pipeline.images.opacity` shows them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.images.transforms import center_crop

Size = tuple[int, int]

# The share of the pixels of an image whose sums are at most that of the stored value 255; those above are clipped.
STORED_QUANTILE = 0.99
# Number of different values of a stored mask. Its pixels are noisy: with 256 it takes 80 % more space in the file.
LEVELS = 32


def gradient_magnitude(gradient: Tensor, size: Size) -> Tensor:
    """Return the mean absolute gradient over the color channels within the centered crop.

    Args:
        gradient: (A, C, H, W) gradient with respect to the images.
        size: (height, width) of the crop.

    Returns:
        (A, height, width), in units of the gradient.
    """
    # A vector norm over the colors takes 70 times as long on a CPU.
    return center_crop(gradient, size).abs().mean(1)


def resized_sums(sums: Tensor, size: Size) -> Tensor:
    """Return sums of gradients, (A, H, W), as those of images of another size, (A, height, width).

    The gradient in a pixel is proportional to the pixel's area, so that the total over the image stays the same.
    """
    area = sums.shape[-2] * sums.shape[-1] / (size[0] * size[1])
    return F.interpolate(sums[:, None], size, mode="bilinear", antialias=True)[:, 0] * area


def to_mask(sums: Tensor) -> Tensor:
    """Scale the sums of each image to 8 bits.

    Args:
        sums: (B, H, W) sums of absolute gradients; values that are not finite count as 0.

    Returns:
        (B, H, W) uint8: 255 · min(1, sum ÷ q), with q the 99th percentile of the image (if that is 0, the largest sum),
        rounded to 32 evenly spaced levels. 0 everywhere for an image without any gradient.
    """
    flat = sums.flatten(1).nan_to_num(0.0, 0.0, 0.0)
    position = max(1, round(STORED_QUANTILE * flat.shape[1]))
    scale = flat.kthvalue(position, dim=1, keepdim=True).values
    scale = torch.where(scale > 0, scale, flat.amax(1, keepdim=True))
    shares = torch.where(scale > 0, flat / scale, torch.zeros_like(flat))
    levels = (shares.clamp(max=1) * (LEVELS - 1)).round()
    return (levels * (255 / (LEVELS - 1))).round().to(torch.uint8).view_as(sums)
