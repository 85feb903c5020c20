"""Opacity of feature visualizations from their transparency masks; importable without PyTorch."""

import numpy as np

from pipeline.data.multiband import to_display_image

# The share of the pixels of an image that are not fully opaque: horama/plots.py, `percentile_alpha`.
SHOWN_QUANTILE = 0.8


def opacity(mask: np.ndarray) -> np.ndarray:
    """Return the opacity that a mask is shown with, as in Horama, the library of the authors of MaCo.

    Args:
        mask: (H, W) uint8, a mask as `pipeline.images.transparency.to_mask` makes it.

    Returns:
        (H, W) uint8, 255 is opaque: the mask ÷ its 80th percentile, clipped at 1. The fifth of the pixels with the
        largest gradients is opaque; a mask of zeros is transparent.
    """
    scale = float(np.quantile(mask, SHOWN_QUANTILE)) or float(mask.max())
    if scale == 0:
        return np.zeros_like(mask)
    return (np.minimum(mask / scale, 1) * 255).round().astype(np.uint8)


def with_opacity(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return an image with the opacity of its mask as fourth channel.

    Args:
        image: (H, W, C) uint8; images with another number of channels than 3 are shown as pages show them.
        mask: (H, W) uint8, its mask as stored.

    Returns:
        (H, W, 4) uint8: red, green, blue and opacity. The colors are those of the image.
    """
    colors = np.asarray(to_display_image(image).convert("RGB"))
    return np.concatenate([colors, opacity(mask)[..., None]], axis=-1)
