"""How an image is shaken at each step, so that only what survives shaking is optimised.

Olah, Mordvintsev & Schubert 2017, "Transformation Robustness". Every draw is *per image and per step*: a
transform turns uniform random numbers into an effect, and the numbers come from each picture's own generator,
so that a picture is shaken alike alone or in a batch of 64. Geometric transforms that follow one another are
multiplied into one matrix and sampled once.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from pipeline.registry import Registry

TRANSFORMS = Registry("transform")


class Geometric:
    """A transform that moves pixels: `matrix` maps output to input coordinates, in pixels from the centre."""

    draws = 0

    def matrix(self, u: Tensor) -> Tensor:
        """(B, draws) uniform numbers → (B, 3, 3) homogeneous matrices."""
        raise AssertionError("a geometric transform defines its matrix")


def _identity(u: Tensor) -> Tensor:
    return torch.eye(3, dtype=u.dtype, device=u.device).repeat(u.shape[0], 1, 1)


@TRANSFORMS.add("jitter")
@dataclasses.dataclass(frozen=True)
class Jitter(Geometric):
    """Shift by a whole number of pixels, up to `pixels` each way in y and x."""

    pixels: int = 8
    draws = 2

    def matrix(self, u: Tensor) -> Tensor:
        """(B, 2) → shifts drawn uniformly from -pixels … pixels."""
        matrix = _identity(u)
        shift = torch.floor(u * (2 * self.pixels + 1)).clamp(max=2 * self.pixels) - self.pixels
        matrix[:, 0, 2], matrix[:, 1, 2] = shift[:, 0], shift[:, 1]
        return matrix


@TRANSFORMS.add("scale")
@dataclasses.dataclass(frozen=True)
class Scale(Geometric):
    """Enlarge about the centre by a factor between `low` and `high`."""

    low: float = 0.9
    high: float = 1.1
    draws = 1

    def matrix(self, u: Tensor) -> Tensor:
        """(B, 1) → factors drawn uniformly."""
        matrix = _identity(u)
        inverse = 1 / (self.low + (self.high - self.low) * u[:, 0])
        matrix[:, 0, 0], matrix[:, 1, 1] = inverse, inverse
        return matrix


@TRANSFORMS.add("rotate")
@dataclasses.dataclass(frozen=True)
class Rotate(Geometric):
    """Turn about the centre by up to `degrees` each way."""

    degrees: float = 10.0
    draws = 1

    def matrix(self, u: Tensor) -> Tensor:
        """(B, 1) → angles drawn uniformly."""
        matrix = _identity(u)
        angle = (2 * u[:, 0] - 1) * math.radians(self.degrees)
        matrix[:, 0, 0], matrix[:, 0, 1] = angle.cos(), -angle.sin()
        matrix[:, 1, 0], matrix[:, 1, 1] = angle.sin(), angle.cos()
        return matrix


def draw(transforms: Sequence[Geometric], generator: Generator, steps: int) -> Tensor:
    """(steps, total draws) uniform numbers for one picture: all its shaking, known before the first step."""
    return torch.rand(steps, sum(t.draws for t in transforms), generator=generator)


def centre(images: Tensor, size: int) -> Tensor:
    """(B, C, S, S) → the middle (B, C, size, size)."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def shake(images: Tensor, transforms: Sequence[Geometric], u: Tensor, size: int) -> Tensor:
    """(B, C, S, S) in [0, 1], shaken by the draws `u` (B, total draws), seen through the middle size × size.

    With S > size the shaking finds picture beyond the edge; what lies beyond the canvas is its reflection.
    The composition is sampled once, bilinearly.
    """
    if not transforms:
        return centre(images, size)
    total = _identity(u)
    start = 0
    for transform in transforms:
        # Output coordinates travel backwards, so the last transform is undone first: it stands on the right.
        total = total @ transform.matrix(u[:, start : start + transform.draws])
        start += transform.draws
    # From pixels about the centre to grid_sample's [-1, 1], of the output on the right, of the canvas on the left.
    theta = total[:, :2, :].clone()
    theta[:, :, :2] = theta[:, :, :2] * (size / images.shape[-1])
    theta[:, :, 2] = theta[:, :, 2] * (2 / images.shape[-1])
    grid = F.affine_grid(theta, [*images.shape[:2], size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
