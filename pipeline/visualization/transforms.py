"""How an image is shaken at each step, so that only what survives shaking is optimised.

Olah, Mordvintsev & Schubert 2017, "Transformation Robustness". Every draw is *per image and per step*: a
transform turns uniform random numbers into an effect, and the numbers come from each picture's own generator,
so that a picture is shaken alike alone or in a batch of 64. Geometric transforms that follow one another are
multiplied into one matrix and sampled once. Whatever is drawn, the network sees pictures of one fixed size.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from pipeline.core.registry import Registry
from pipeline.kernels.affine_sample import sample
from pipeline.visualization.filters import blur

TRANSFORMS = Registry("transform")

Size = tuple[int, int]


class Transform:
    """Anything that shakes; `draws` uniform numbers are used up by each image at each step."""

    draws: ClassVar[int] = 0


class Geometric(Transform):
    """A transform that moves pixels: `matrix` maps output to input coordinates, in pixels from the centre."""

    def matrix(self, u: Tensor, canvas: Size, view: Size) -> Tensor:
        """(B, draws) uniform numbers → (B, 3, 3) homogeneous matrices, for a canvas seen through a view."""
        raise NotImplementedError


class Effect(Transform):
    """A transform that changes pixels where they are."""

    def apply(self, images: Tensor, u: Tensor) -> Tensor:
        """(B, C, H, W) and (B, draws) uniform numbers → (B, C, H, W)."""
        raise NotImplementedError


def _identity(u: Tensor) -> Tensor:
    return torch.eye(3, dtype=u.dtype, device=u.device).repeat(u.shape[0], 1, 1)


def _choose(values: tuple[float, ...], low: float, high: float, u: Tensor) -> Tensor:
    """One of `values` if there are any, else uniform between low and high."""
    if values:
        return u.new_tensor(values)[(u * len(values)).long().clamp(max=len(values) - 1)]
    return low + (high - low) * u


def _normal(u: Tensor) -> Tensor:
    """Uniform numbers → standard normal ones, never beyond about 5."""
    return math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6))


@TRANSFORMS.add("jitter")
@dataclasses.dataclass(frozen=True)
class Jitter(Geometric):
    """Shift by a whole number of pixels, up to `pixels` each way in y and x.

    lucid's `jitter(d)` is a window that loses d pixels: shifts of -d/2 … d/2, hence `pixels` = d / 2.
    """

    pixels: int = 8
    draws: ClassVar[int] = 2

    def matrix(self, u: Tensor, canvas: Size, view: Size) -> Tensor:
        """(B, 2) → shifts drawn uniformly from -pixels … pixels."""
        matrix = _identity(u)
        shift = torch.floor(u * (2 * self.pixels + 1)).clamp(max=2 * self.pixels) - self.pixels
        matrix[:, 0, 2], matrix[:, 1, 2] = shift[:, 0], shift[:, 1]
        return matrix


@TRANSFORMS.add("scale")
@dataclasses.dataclass(frozen=True)
class Scale(Geometric):
    """Enlarge about the centre by a factor between `low` and `high`, or by one of `values`."""

    low: float = 0.9
    high: float = 1.1
    values: tuple[float, ...] = ()
    draws: ClassVar[int] = 1

    def matrix(self, u: Tensor, canvas: Size, view: Size) -> Tensor:
        """(B, 1) → factors drawn uniformly."""
        matrix = _identity(u)
        inverse = 1 / _choose(self.values, self.low, self.high, u[:, 0])
        matrix[:, 0, 0], matrix[:, 1, 1] = inverse, inverse
        return matrix


@TRANSFORMS.add("rotate")
@dataclasses.dataclass(frozen=True)
class Rotate(Geometric):
    """Turn about the centre by up to `degrees` each way, or by one of `values`."""

    degrees: float = 10.0
    values: tuple[float, ...] = ()
    draws: ClassVar[int] = 1

    def matrix(self, u: Tensor, canvas: Size, view: Size) -> Tensor:
        """(B, 1) → angles drawn uniformly."""
        matrix = _identity(u)
        angle = _choose(self.values, -self.degrees, self.degrees, u[:, 0]) * (math.pi / 180)
        matrix[:, 0, 0], matrix[:, 0, 1] = angle.cos(), -angle.sin()
        matrix[:, 1, 0], matrix[:, 1, 1] = angle.sin(), angle.cos()
        return matrix


@TRANSFORMS.add("flip")
@dataclasses.dataclass(frozen=True)
class Flip(Geometric):
    """Mirror left and right with probability `chance`."""

    chance: float = 0.5
    draws: ClassVar[int] = 1

    def matrix(self, u: Tensor, canvas: Size, view: Size) -> Tensor:
        """(B, 1) → reflections."""
        matrix = _identity(u)
        matrix[:, 0, 0] = torch.where(u[:, 0] < self.chance, -1.0, 1.0)
        return matrix


@TRANSFORMS.add("crop")
@dataclasses.dataclass(frozen=True)
class Crop(Geometric):
    """Look through a window of the view's size that lies somewhere on a larger canvas, at pixel scale.

    `spread` is the standard deviation of its place, as a share of the room that the canvas leaves (deepdraw:
    0.3); null draws it uniformly. A canvas no larger than the view leaves no room.
    """

    spread: float | None = 0.3
    draws: ClassVar[int] = 2

    def matrix(self, u: Tensor, canvas: Size, view: Size) -> Tensor:
        """(B, 2) → shifts by whole pixels within the canvas."""
        matrix = _identity(u)
        for axis, column in ((1, 0), (0, 1)):  # x is row 0 of the matrix
            room = max(0, canvas[axis] - view[axis])
            share = u[:, column] - 0.5 if self.spread is None else self.spread * _normal(u[:, column])
            matrix[:, column, 2] = torch.round(share.clamp(-0.5, 0.5) * room)
        return matrix


@TRANSFORMS.add("zoom")
@dataclasses.dataclass(frozen=True)
class Zoom(Geometric):
    """Enlarge a random square part of the canvas, `low` to `high` of its side, to the whole view.

    After the crops of MaCo (Fel et al. 2023) and Horama, whose places are normal about the centre, `spread` of
    the side; here parts never leave the canvas.
    """

    low: float = 0.5
    high: float = 0.8
    spread: float = 0.15
    draws: ClassVar[int] = 3

    def matrix(self, u: Tensor, canvas: Size, view: Size) -> Tensor:
        """(B, 3) → part, x, y."""
        matrix = _identity(u)
        part = self.low + (self.high - self.low) * u[:, 0]
        for axis, column in ((1, 0), (0, 1)):
            matrix[:, column, column] = part * (canvas[axis] / view[axis])
            place = self.spread * _normal(u[:, 1 + column])
            matrix[:, column, 2] = torch.minimum(torch.maximum(place, (part - 1) / 2), (1 - part) / 2) * canvas[axis]
        return matrix


@TRANSFORMS.add("pad")
@dataclasses.dataclass(frozen=True)
class Pad(Transform):
    """Frame the canvas, so that what is shaken in from beyond its edge is `grey`; without it, it is a reflection.

    lucid pads by 12 pixels of 0.5 first of all. `pixels` is how wide the frame is; beyond it all is reflected.
    """

    pixels: int = 12
    grey: float = 0.5


@TRANSFORMS.add("noise")
@dataclasses.dataclass(frozen=True)
class Noise(Effect):
    """Add Gaussian noise of standard deviation `sd` to every pixel."""

    sd: float = 0.05
    draws: ClassVar[int] = 2

    def apply(self, images: Tensor, u: Tensor) -> Tensor:
        """(B, 2) → 48 random bits that key each image's noise."""
        key = (u[:, 0].double() * 2**24).long() * 2**24 + (u[:, 1].double() * 2**24).long()
        return images + self.sd * gaussian(key, images[0].numel()).to(images.dtype).view_as(images)


@TRANSFORMS.add("blur")
@dataclasses.dataclass(frozen=True)
class Blur(Effect):
    """Blur by a Gaussian whose sigma lies between `low` and `high` pixels."""

    low: float = 0.0
    high: float = 1.0
    draws: ClassVar[int] = 1

    def apply(self, images: Tensor, u: Tensor) -> Tensor:
        """(B, 1) → sigmas drawn uniformly."""
        return blur(images, self.low + (self.high - self.low) * u[:, 0], self.high)


def gaussian(keys: Tensor, count: int) -> Tensor:
    """(B,) int64 keys → (B, count) standard normal numbers, the same on every device.

    Counter-based: the splitmix64 finaliser (Steele, Lea & Flood 2014) of key and position, then Box–Muller. No
    generator could be seeded per image on a GPU without waiting for it.
    """

    def mix(x: Tensor) -> Tensor:
        # int64 wraps around; a logical right shift is an arithmetic one with the sign's copies masked off.
        x = (x ^ ((x >> 30) & (2**34 - 1))) * -4658895280553007687
        x = (x ^ ((x >> 27) & (2**37 - 1))) * -7723592293110705685
        return x ^ ((x >> 31) & (2**33 - 1))

    pairs = (count + 1) // 2
    at = torch.arange(2 * pairs, device=keys.device) * -7046029254386353131
    bits = mix(mix(keys)[:, None] + at[None])
    uniform = ((bits >> 40) & (2**24 - 1)).float().add_(0.5).div_(2**24)
    radius = torch.sqrt(-2 * torch.log(uniform[:, :pairs]))
    angle = 2 * math.pi * uniform[:, pairs:]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)[:, :count]


def draw(transforms: Sequence[Transform], generator: Generator, steps: int) -> Tensor:
    """(steps, total draws) uniform numbers for one picture: all its shaking, known before the first step."""
    return torch.rand(steps, sum(t.draws for t in transforms), generator=generator)


def centre(images: Tensor, size: Size) -> Tensor:
    """(B, C, H, W) → the middle (B, C, *size)."""
    top, left = (images.shape[-2] - size[0]) // 2, (images.shape[-1] - size[1]) // 2
    return images[..., top : top + size[0], left : left + size[1]]


def shake(images: Tensor, transforms: Sequence[Transform], u: Tensor, size: Size) -> Tensor:
    """(B, C, H, W) in [0, 1], shaken by the draws `u` (B, total draws), seen through the middle `size`.

    With a canvas larger than `size` the shaking finds picture beyond the edge; what lies beyond the canvas is its
    reflection. Geometric transforms in a row are sampled once, bilinearly; the last ones straight into the view.
    """
    last = max((i for i, t in enumerate(transforms) if isinstance(t, Geometric)), default=-1)
    canvas = (images.shape[-2], images.shape[-1])
    moved: Tensor | None = None
    start = 0
    for i, transform in enumerate(transforms):
        own = u[:, start : start + transform.draws]
        start += transform.draws
        if isinstance(transform, Geometric):
            # Output coordinates travel backwards, so the last transform is undone first: it stands on the right.
            matrix = transform.matrix(own, canvas, size)
            moved = matrix if moved is None else moved @ matrix
            if i == last:
                images, moved = sample(images, moved, size), None
            continue
        if moved is not None:
            images, moved = sample(images, moved, (images.shape[-2], images.shape[-1])), None
        if isinstance(transform, Pad):
            images = F.pad(images, (transform.pixels,) * 4, value=transform.grey)
        elif isinstance(transform, Effect):
            if last < i:
                images = centre(images, size)
            images = transform.apply(images, own)
    return images if (images.shape[-2], images.shape[-1]) == size else centre(images, size)


# The yardstick of robustness for every picture, whatever it was shaken by while it was made.
STANDARD: tuple[Geometric, ...] = (Jitter(8), Scale(0.9, 1.1), Rotate(10.0), Jitter(4))
