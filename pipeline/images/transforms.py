"""Random image transformations for transformation robustness (Olah, Mordvintsev & Schubert 2017).

Transformations are drawn *for each image and each step*. A transformation is a function of uniform random numbers from
the generator of the image, so that it does not depend on the batch. The matrices of consecutive geometric
transformations are multiplied, and the image is resampled once. The size of the transformed images is fixed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from pipeline.core.registry import Registry
from pipeline.data.image_filters import blur
from pipeline.kernels.affine_sample import sample
from pipeline.kernels.transfers import constant_like

TRANSFORMS = Registry("transform")

Size = tuple[int, int]


class Transform:
    """Base class of transformations.

    Attributes:
        num_random: Number of uniform random numbers that an image needs at each step.
    """

    num_random: ClassVar[int] = 0


class Geometric(Transform):
    """Base class of transformations that move pixels."""

    def matrix(self, u: Tensor, canvas: Size, view: Size) -> Tensor:
        """Return the homogeneous matrices from output to input coordinates, in pixels from the center.

        Args:
            u: (B, num_random) uniform random numbers.
            canvas: (height, width) of the input.
            view: (height, width) of the output.

        Returns:
            (B, 3, 3).
        """
        raise NotImplementedError


class Effect(Transform):
    """Base class of transformations that change pixel values."""

    def apply(self, images: Tensor, u: Tensor) -> Tensor:
        """Return the transformed (B, C, H, W) images, by (B, num_random) uniform random numbers."""
        raise NotImplementedError


def _identity(u: Tensor) -> Tensor:
    return torch.eye(3, dtype=u.dtype, device=u.device).repeat(u.shape[0], 1, 1)


def _choose(values: tuple[float, ...], low: float, high: float, u: Tensor) -> Tensor:
    """Map uniform numbers to `values` with equal probability; to the range from low to high if there are no values."""
    if values:
        return constant_like(u, values)[(u * len(values)).long().clamp(max=len(values) - 1)]
    return low + (high - low) * u


def _normal(u: Tensor) -> Tensor:
    """Map uniform to standard normal numbers, of absolute value at most about 5."""
    return math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6))


@TRANSFORMS.add("jitter")
@dataclasses.dataclass(frozen=True)
class Jitter(Geometric):
    """Shift by a random whole number of pixels, from -`pixels` to `pixels` in y and x.

    `jitter(d)` of lucid crops an image that is d pixels larger, which shifts by -d/2 … d/2: `pixels` = d / 2.
    """

    pixels: int = 8
    num_random: ClassVar[int] = 2

    def matrix(self, u: Tensor, canvas: Size, view: Size) -> Tensor:
        """Return shifts, uniform in -pixels … pixels, from (B, 2) random numbers."""
        matrix = _identity(u)
        shift = torch.floor(u * (2 * self.pixels + 1)).clamp(max=2 * self.pixels) - self.pixels
        matrix[:, 0, 2], matrix[:, 1, 2] = shift[:, 0], shift[:, 1]
        return matrix


@TRANSFORMS.add("scale")
@dataclasses.dataclass(frozen=True)
class Scale(Geometric):
    """Enlarge about the center by a random factor between `low` and `high`, or by one of `values`."""

    low: float = 0.9
    high: float = 1.1
    values: tuple[float, ...] = ()
    num_random: ClassVar[int] = 1

    def matrix(self, u: Tensor, canvas: Size, view: Size) -> Tensor:
        """Return scalings from (B, 1) random numbers."""
        matrix = _identity(u)
        inverse = 1 / _choose(self.values, self.low, self.high, u[:, 0])
        matrix[:, 0, 0], matrix[:, 1, 1] = inverse, inverse
        return matrix


@TRANSFORMS.add("rotate")
@dataclasses.dataclass(frozen=True)
class Rotate(Geometric):
    """Rotate about the center by a random angle between -`degrees` and `degrees`, or by one of `values`."""

    degrees: float = 10.0
    values: tuple[float, ...] = ()
    num_random: ClassVar[int] = 1

    def matrix(self, u: Tensor, canvas: Size, view: Size) -> Tensor:
        """Return rotations from (B, 1) random numbers."""
        matrix = _identity(u)
        angle = _choose(self.values, -self.degrees, self.degrees, u[:, 0]) * (math.pi / 180)
        matrix[:, 0, 0], matrix[:, 0, 1] = angle.cos(), -angle.sin()
        matrix[:, 1, 0], matrix[:, 1, 1] = angle.sin(), angle.cos()
        return matrix


@TRANSFORMS.add("flip")
@dataclasses.dataclass(frozen=True)
class Flip(Geometric):
    """Flip horizontally with probability `chance`."""

    chance: float = 0.5
    num_random: ClassVar[int] = 1

    def matrix(self, u: Tensor, canvas: Size, view: Size) -> Tensor:
        """Return reflections or identities from (B, 1) random numbers."""
        matrix = _identity(u)
        matrix[:, 0, 0] = torch.where(u[:, 0] < self.chance, -1.0, 1.0)
        return matrix


@TRANSFORMS.add("crop")
@dataclasses.dataclass(frozen=True)
class Crop(Geometric):
    """Crop the view from a random position of a larger canvas, without scaling.

    The position is normal about the center; `spread` is its standard deviation as a fraction of the difference in size
    of canvas and view (deepdraw: 0.3). With null it is uniform. A canvas as large as the view is not cropped.
    """

    spread: float | None = 0.3
    num_random: ClassVar[int] = 2

    def matrix(self, u: Tensor, canvas: Size, view: Size) -> Tensor:
        """Return shifts by whole pixels within the canvas, from (B, 2) random numbers."""
        matrix = _identity(u)
        for axis, column in ((1, 0), (0, 1)):  # x is row 0 of the matrix
            room = max(0, canvas[axis] - view[axis])
            fraction = u[:, column] - 0.5 if self.spread is None else self.spread * _normal(u[:, column])
            matrix[:, column, 2] = torch.round(fraction.clamp(-0.5, 0.5) * room)
        return matrix


@TRANSFORMS.add("zoom")
@dataclasses.dataclass(frozen=True)
class Zoom(Geometric):
    """Resize a random crop of the canvas to the view; its sides are `low` to `high` times those of the canvas.

    As the crops of MaCo (Fel et al. 2023) and Horama: the position is normal about the center, with a standard
    deviation of `spread` times the side of the canvas. Unlike those, crops never leave the canvas.
    """

    low: float = 0.5
    high: float = 0.9
    spread: float = 0.15
    num_random: ClassVar[int] = 3

    def matrix(self, u: Tensor, canvas: Size, view: Size) -> Tensor:
        """Return crops from (B, 3) random numbers: the size, x and y."""
        matrix = _identity(u)
        fraction = self.low + (self.high - self.low) * u[:, 0]
        for axis, column in ((1, 0), (0, 1)):
            matrix[:, column, column] = fraction * (canvas[axis] / view[axis])
            position = self.spread * _normal(u[:, 1 + column])
            limit = (1 - fraction) / 2
            matrix[:, column, 2] = torch.minimum(torch.maximum(position, -limit), limit) * canvas[axis]
        return matrix


@TRANSFORMS.add("pad")
@dataclasses.dataclass(frozen=True)
class Pad(Transform):
    """Pad the canvas by `pixels` pixels of the constant `grey`, before later transformations.

    Beyond the edges of the padded canvas, and of one without padding, images are reflected. lucid pads by 12 pixels of
    0.5 before all other transformations.
    """

    pixels: int = 12
    grey: float = 0.5


@TRANSFORMS.add("noise")
@dataclasses.dataclass(frozen=True)
class Noise(Effect):
    """Add Gaussian noise of standard deviation `sd` to every value."""

    sd: float = 0.05
    num_random: ClassVar[int] = 2

    def apply(self, images: Tensor, u: Tensor) -> Tensor:
        """Add noise whose key, 48 bits for each image, is made from (B, 2) random numbers."""
        key = (u[:, 0].double() * 2**24).long() * 2**24 + (u[:, 1].double() * 2**24).long()
        return images + self.sd * gaussian(key, images[0].numel()).to(images.dtype).view_as(images)


@TRANSFORMS.add("blur")
@dataclasses.dataclass(frozen=True)
class Blur(Effect):
    """Blur by a Gaussian with a random standard deviation between `low` and `high` pixels."""

    low: float = 0.0
    high: float = 1.0
    num_random: ClassVar[int] = 1

    def apply(self, images: Tensor, u: Tensor) -> Tensor:
        """Return blurred images; the standard deviations are made from (B, 1) random numbers."""
        return blur(images, self.low + (self.high - self.low) * u[:, 0], self.high)


def gaussian(keys: Tensor, count: int) -> Tensor:
    """Return standard normal random numbers, equal on every device.

    Counter-based: the splitmix64 finalizer (Steele, Lea & Flood 2014) of key and position, then the Box–Muller
    transform. A generator on the GPU cannot be seeded for each image without synchronization.

    Args:
        keys: (B,) int64 key of each image.
        count: Number of random numbers for each key.

    Returns:
        (B, count) float32.
    """

    def mix(x: Tensor) -> Tensor:
        # int64 wraps around. A logical right shift is an arithmetic one with the copies of the sign bit masked.
        x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
        x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
        return x ^ ((x >> 31) & (2**33 - 1))

    pairs = (count + 1) // 2
    counters = torch.arange(2 * pairs, device=keys.device) * -7046029254386353131
    bits = mix(mix(keys)[:, None] + counters[None])
    uniform = ((bits >> 40) & (2**24 - 1)).float().add_(0.5).div_(2**24)
    radius = torch.sqrt(-2 * torch.log(uniform[:, :pairs]))
    angle = 2 * math.pi * uniform[:, pairs:]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :count]


def draw_random(transforms: Sequence[Transform], generator: Generator, steps: int) -> Tensor:
    """Draw the random numbers of all transformations of one image for all steps, (steps, total num_random)."""
    return torch.rand(steps, sum(t.num_random for t in transforms), generator=generator)


def center_crop(images: Tensor, size: Size) -> Tensor:
    """Return the central part of images: (B, C, H, W) → (B, C, *size)."""
    top, left = (images.shape[-2] - size[0]) // 2, (images.shape[-1] - size[1]) // 2
    return images[..., top : top + size[0], left : left + size[1]]


def resampling_matrices(transforms: Sequence[Transform], random: Tensor, canvas: Size, view: Size) -> list[Tensor]:
    """Return the matrices that `apply_transforms` resamples images through, one for each resampling.

    They are the products of the matrices of consecutive geometric transformations, and do not depend on the images:
    those of many steps can be computed together.

    Args:
        transforms: The transformations, in their order.
        random: (B, total num_random) uniform random numbers, from `draw_random`.
        canvas: (height, width) of the images.
        view: (height, width) of the output.

    Returns:
        (B, 3, 3) each.
    """
    products: list[Tensor] = []
    follows_geometric = False
    used = 0
    for transform in transforms:
        u = random[:, used : used + transform.num_random]
        used += transform.num_random
        if isinstance(transform, Geometric):
            matrix = transform.matrix(u, canvas, view)
            if follows_geometric:
                # Matrices map output to input coordinates: that of the last one is applied first, on the right.
                products[-1] = products[-1] @ matrix
            else:
                products.append(matrix)
        follows_geometric = isinstance(transform, Geometric)
    return products


def apply_transforms(
    images: Tensor,
    transforms: Sequence[Transform],
    random: Tensor,
    size: Size,
    matrices: Sequence[Tensor] | None = None,
) -> Tensor:
    """Transform images and crop them to the center.

    On a canvas larger than `size`, transformations move parts of the canvas beyond the crop into it; beyond the edges
    of the canvas, images are reflected. Consecutive geometric transformations are resampled once, bilinearly; the last
    ones directly to the output size.

    Args:
        images: (B, C, H, W) in [0, 1].
        transforms: The transformations, in this order.
        random: (B, total num_random) uniform random numbers, from `draw_random`.
        size: (height, width) of the output.
        matrices: The result of `resampling_matrices`, if it was computed before.

    Returns:
        (B, C, *size).
    """
    canvas = (images.shape[-2], images.shape[-1])
    if matrices is None:
        matrices = resampling_matrices(transforms, random, canvas, size)
    last_geometric = max((i for i, t in enumerate(transforms) if isinstance(t, Geometric)), default=-1)
    remaining = iter(matrices)
    used = 0
    for i, transform in enumerate(transforms):
        u = random[:, used : used + transform.num_random]
        used += transform.num_random
        if isinstance(transform, Geometric):
            if i == last_geometric:
                images = sample(images, next(remaining), size)
            elif not isinstance(transforms[i + 1], Geometric):
                images = sample(images, next(remaining), (images.shape[-2], images.shape[-1]))
        elif isinstance(transform, Pad):
            images = F.pad(images, (transform.pixels,) * 4, value=transform.grey)
        elif isinstance(transform, Effect):
            if i > last_geometric:
                images = center_crop(images, size)
            images = transform.apply(images, u)
    return images if (images.shape[-2], images.shape[-1]) == size else center_crop(images, size)


# Transformations that the robust activation of every visualization is measured under, whatever its preset.
ROBUSTNESS_TRANSFORMS: tuple[Geometric, ...] = (Jitter(8), Scale(0.9, 1.1), Rotate(10.0), Jitter(4))
