"""Kernels of layers that are linear in the pixels, drawn as small images for the pages."""

import base64
import io

import numpy as np
from PIL import Image

# Orthonormal axes of color, rows: black to white, green to red, blue to yellow. A color kernel is the sum of its parts
# along them.
AXES = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2]], np.float64) / np.sqrt([[3], [2], [6]])
TITLES = ("lightness", "red − green", "yellow − blue")


# A kernel that is weaker than the median of its layer by more than this factor is gray: that of a channel that is off.
NEGLIGIBLE = 1e-3


def layer_scale(kernels: np.ndarray) -> float:
    """Return the least scale on which the kernels (C', I, k, k') of a layer are drawn; see `kernel_views`."""
    return NEGLIGIBLE * float(np.median(np.abs(kernels).max((1, 2, 3)))) or 1.0


def kernel_views(kernel: np.ndarray, least_scale: float) -> list[tuple[str, str]]:
    """Return (title, data URI of a PNG of k × k' pixels) of a kernel, and of its parts for color images.

    All are drawn on the same scale: gray is 0, and the largest absolute value of the kernel, or `least_scale` if it is
    larger, is the largest deviation from gray. The parts of a color kernel are its projections on lightness and on the
    two axes of opponent colors.

    Args:
        kernel: (I, k, k'), where I is 3 for color images. Other numbers of channels get one view of their mean.
        least_scale: Above 0.
    """
    scale = max(float(np.abs(kernel).max()), least_scale)
    if len(kernel) != 3:
        return [("kernel", _data_uri(np.broadcast_to(kernel.mean(0), (3, *kernel.shape[1:])) / scale))]
    parts = [np.einsum("a,b,bhw->ahw", axis, axis, kernel) / scale for axis in AXES]
    return [("kernel", _data_uri(kernel / scale)), *zip(TITLES, map(_data_uri, parts), strict=True)]


def _data_uri(values: np.ndarray) -> str:
    """Encode values (3, h, w) in −1 … 1 as a PNG in which 0 is gray."""
    pixels = np.clip(127.5 + 127.5 * values, 0, 255).round().astype(np.uint8).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
