"""How a picture is parameterised: numbers that the optimiser moves → an image in [0, 1].

A canvas is pure mathematics. `start` draws the first numbers of one picture from its own generator (so that a
unit's start never depends on its batch), `image` turns a batch of them into images, `fit` finds the numbers of
given images, `blurred` and `resized` act on the numbers as they would on the images, where the canvas can.

The squash is the same everywhere: the canvas's own image, any real number, is mixed into RGB by the colour
matrix and sent through a sigmoid, so that a picture lies strictly within (0, 1), whatever the optimiser does.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError
from pipeline.core.registry import Registry
from pipeline.data.natural_spectrum import Spectrum
from pipeline.visualization.filters import blur, frequencies

CANVASES = Registry("canvas")

Size = tuple[int, int]

# Colour covariance of ImageNet, as a square root: lucid/optvis/param/color.py, divided by its largest row norm.
# Rows are R, G, B; columns are the decorrelated axes (lightness, blue–orange, green–magenta).
COLOUR = (
    (0.5628, 0.1948, 0.0433),
    (0.5845, 0.0000, -0.1082),
    (0.5845, -0.1948, 0.0649),
)

COLOURS = ("plain", "decorrelated", "measured")

# `fit` keeps pixels this far off black and white, where the sigmoid's inverse is infinite: a quarter of an 8-bit step.
EDGE = 1 / 1024


@dataclasses.dataclass(frozen=True)
class Parameterization:
    """What every canvas shares: colour.

    `colour` is `decorrelated` (the field's matrix; 1 or n channels stay as they are), `plain`, or `measured` (the
    matrix in `spectrum`, a file made by `atlas spectrum`).
    """

    colour: str = "decorrelated"
    spectrum: ConfigFile = ConfigFile("default")

    packaged: ClassVar[str] = "data/natural_spectrum.npz"
    can_blur: ClassVar[bool] = True
    can_grow: ClassVar[bool] = True
    # True where the last axis of the parameters holds real and imaginary parts.
    paired: ClassVar[bool] = False

    def wants(self, field: str) -> bool:
        """Whether a file among its settings is used at all."""
        return field != "spectrum" or self.colour == "measured"

    def check(self, channels: int) -> None:
        """Raise `AtlasError` for settings that make no sense, or do not suit `channels` input channels."""
        if self.colour not in COLOURS:
            raise AtlasError(f"render.canvas.colour={self.colour!r} is not one of {', '.join(COLOURS)}.")
        if self.colour == "measured":
            self._fits(channels)

    def _fits(self, channels: int) -> None:
        found = len(self.measured.mean)
        if found != channels:
            raise AtlasError(
                f"render.canvas.spectrum={self.spectrum.path!r} has {found} channels, the network takes {channels}. "
                "`atlas spectrum model=… data.root=… out=…` measures one that fits."
            )

    @functools.cached_property
    def measured(self) -> Spectrum:
        """The spectrum file's arrays."""
        return Spectrum.of(self.spectrum)

    def matrix(self, channels: int) -> Tensor | None:
        """(C, C) decorrelated axes → colours; None for the identity."""
        if self.colour == "measured":
            return torch.from_numpy(self.measured.colour)
        return torch.tensor(COLOUR) if self.colour == "decorrelated" and channels == 3 else None

    def squash(self, plain: Tensor) -> Tensor:
        """(B, C, H, W) of any range → colours in (0, 1)."""
        matrix = self.matrix(plain.shape[1])
        if matrix is not None:
            plain = (matrix.to(plain) @ plain.flatten(2)).view_as(plain)
        return torch.sigmoid(plain)

    def unsquash(self, images: Tensor) -> Tensor:
        """The inverse of `squash`, (B, C, H, W), for images in [0, 1]."""
        plain = torch.logit(images.clamp(EDGE, 1 - EDGE))
        matrix = self.matrix(plain.shape[1])
        if matrix is not None:
            plain = (torch.linalg.inv(matrix.double()).to(plain) @ plain.flatten(2)).view_as(plain)
        return plain

    def start(self, generator: Generator, channels: int, size: Size) -> Tensor:
        """The first parameters of one picture, `size` = (height, width) in pixels."""
        raise NotImplementedError

    def image(self, parameters: Tensor, size: Size) -> Tensor:
        """(B, …) parameters → (B, C, height, width) in (0, 1)."""
        raise NotImplementedError

    def project(self, parameters: Tensor) -> None:
        """Bring parameters back, in place, to where they have a meaning; called after every step."""

    def fit(self, images: Tensor) -> Tensor:
        """(B, C, height, width) images in [0, 1] → the parameters that give them back."""
        raise NotImplementedError

    def blurred(self, parameters: Tensor, sigma: float, size: Size) -> Tensor:
        """Parameters of the same pictures, blurred before the squash by a Gaussian of `sigma` pixels."""
        raise NotImplementedError

    def resized(self, parameters: Tensor, old: Size, new: Size) -> Tensor:
        """Parameters of the same pictures at another size."""
        raise NotImplementedError


@CANVASES.add("pixel")
@dataclasses.dataclass(frozen=True)
class Pixel(Parameterization):
    """One number a pixel and channel: the naive canvas, which favours high frequencies.

    With `clip` the numbers are the pixels themselves, brought back into [0, 1] after every step, and there is
    neither sigmoid nor colour matrix: the way of DeepDream and deepdraw. `mean` in [0, 1] is where they start.
    """

    sd: float = 0.01
    mean: float = 0.5
    clip: bool = False
    colour: str = "plain"

    def check(self, channels: int) -> None:
        """Also: a clipped canvas has plain colours."""
        super().check(channels)
        if self.clip and self.colour != "plain":
            raise AtlasError("render.canvas.clip=true knows plain colours only: set render.canvas.colour=plain.")
        if not 0 < self.mean < 1:
            raise AtlasError(f"render.canvas.mean={self.mean} must lie between 0 and 1.")

    def start(self, generator: Generator, channels: int, size: Size) -> Tensor:
        """(C, H, W) Gaussian noise of standard deviation `sd` about `mean`."""
        noise = torch.randn(channels, *size, generator=generator) * self.sd
        if self.clip:
            return noise.add_(self.mean).clamp_(0, 1)
        return noise + math.log(self.mean / (1 - self.mean))

    def image(self, parameters: Tensor, size: Size) -> Tensor:
        """(B, C, H, W) → (B, C, H, W) in (0, 1), or [0, 1] with `clip`."""
        return parameters if self.clip else self.squash(parameters)

    def project(self, parameters: Tensor) -> None:
        """With `clip`: back into [0, 1]."""
        if self.clip:
            parameters.clamp_(0, 1)

    def fit(self, images: Tensor) -> Tensor:
        """The inverse squash."""
        return images.clone() if self.clip else self.unsquash(images)

    def blurred(self, parameters: Tensor, sigma: float, size: Size) -> Tensor:
        """Blurred as an image."""
        return blur(parameters, sigma)

    def resized(self, parameters: Tensor, old: Size, new: Size) -> Tensor:
        """Interpolated, bilinear and antialiased."""
        return F.interpolate(parameters, new, mode="bilinear", antialias=True)


@CANVASES.add("fourier")
@dataclasses.dataclass(frozen=True)
class Fourier(Parameterization):
    """A spectrum scaled by 1/f^decay, so that equal steps change all scales of a natural image alike.

    Olah, Mordvintsev & Schubert 2017, "Preconditioning and Parameterization"; constants of
    lucid/optvis/param/spatial.py (sd 0.01, decay 1, and its division by 4 as `gain`).
    """

    sd: float = 0.01
    decay: float = 1.0
    gain: float = 0.25

    paired: ClassVar[bool] = True

    def scale(self, size: Size, device: torch.device | None = None) -> Tensor:
        """(H, W // 2 + 1) factor of each frequency."""
        return frequencies(*size, device=device).clamp(min=1 / max(size)) ** -self.decay * self.gain

    def start(self, generator: Generator, channels: int, size: Size) -> Tensor:
        """(C, H, W // 2 + 1, 2) real and imaginary parts, Gaussian of standard deviation `sd`."""
        return torch.randn(channels, size[0], size[1] // 2 + 1, 2, generator=generator) * self.sd

    def image(self, parameters: Tensor, size: Size) -> Tensor:
        """(B, C, H, W // 2 + 1, 2) → (B, C, H, W) in (0, 1)."""
        spectrum = torch.view_as_complex(parameters * _scales(self, size, parameters.device).to(parameters))
        # norm="ortho" is lucid's inverse transform times its factor sqrt(h·w).
        return self.squash(torch.fft.irfft2(spectrum, s=size, norm="ortho"))

    def fit(self, images: Tensor) -> Tensor:
        """The spectrum of the unsquashed image, divided by the scale."""
        size = (images.shape[-2], images.shape[-1])
        spectrum = torch.fft.rfft2(self.unsquash(images), norm="ortho")
        return torch.view_as_real(spectrum / self.scale(size, images.device)).contiguous()

    def blurred(self, parameters: Tensor, sigma: float, size: Size) -> Tensor:
        """Times the Gaussian's transfer function exp(-2 (π σ f)²); edges wrap around."""
        passed = torch.exp(-2 * (torch.pi * sigma * frequencies(*size, device=parameters.device)) ** 2)
        return parameters * passed[..., None]

    def resized(self, parameters: Tensor, old: Size, new: Size) -> Tensor:
        """The spectrum zero-padded (or cut), each frequency keeping what it is in cycles per picture."""
        spectrum = torch.view_as_complex(parameters.contiguous()) * self.scale(old, parameters.device)
        target = spectrum.new_zeros(*spectrum.shape[:2], new[0], new[1] // 2 + 1)
        rows, columns = min(old[0], new[0]), min(old[1], new[1]) // 2 + 1
        if min(old[1], new[1]) % 2 == 0:
            columns -= 1  # the Nyquist column has no sign, hence no place in another size
        low = (rows - 1) // 2
        target[:, :, : low + 1, :columns] = spectrum[:, :, : low + 1, :columns]
        target[:, :, new[0] - low :, :columns] = spectrum[:, :, old[0] - low :, :columns]
        # The orthonormal transform divides by the root of the number of pixels.
        grown = (new[0] * new[1] / (old[0] * old[1])) ** 0.5
        return torch.view_as_real(target * grown / self.scale(new, parameters.device)).contiguous()


@functools.lru_cache(maxsize=8)
def _scales(canvas: Fourier, size: Size, device: torch.device) -> Tensor:
    """(H, W // 2 + 1, 2): its scale for real and imaginary parts, laid out in full, for broadcasting is slow."""
    return canvas.scale(size, device)[..., None].expand(-1, -1, 2).contiguous()


@CANVASES.add("laplacian")
@dataclasses.dataclass(frozen=True)
class Laplacian(Parameterization):
    """A sum of images of halving size, each enlarged to the whole: coarse and fine parts are moved alike.

    As lucid/optvis/param/spatial.py, `laplacian_pyramid_image` (which has 4 levels, sd 0.01 and divides by 3).
    Parameters are (C, N): the levels side by side, fine to coarse.
    """

    sd: float = 0.01
    levels: int = 4
    gain: float = 1 / 3

    def check(self, channels: int) -> None:
        """Also: at least one level."""
        super().check(channels)
        if self.levels < 1:
            raise AtlasError(f"render.canvas.levels={self.levels} is too small: at least 1.")

    def sizes(self, size: Size) -> list[Size]:
        """(height, width) of each level, fine to coarse; never under 1 pixel."""
        return [(max(1, size[0] >> i), max(1, size[1] >> i)) for i in range(self.levels)]

    def start(self, generator: Generator, channels: int, size: Size) -> Tensor:
        """(C, N) Gaussian noise of standard deviation `sd`."""
        return torch.randn(channels, sum(h * w for h, w in self.sizes(size)), generator=generator) * self.sd

    def _split(self, parameters: Tensor, size: Size) -> list[Tensor]:
        sizes = self.sizes(size)
        parts = parameters.split([h * w for h, w in sizes], dim=2)
        return [part.unflatten(2, s) for part, s in zip(parts, sizes, strict=True)]

    def image(self, parameters: Tensor, size: Size) -> Tensor:
        """(B, C, N) → (B, C, H, W) in (0, 1)."""
        levels = self._split(parameters, size)
        total = levels[0]
        for level in levels[1:]:
            total = total + F.interpolate(level, size, mode="bilinear", align_corners=False)
        return self.squash(total * self.gain)

    def fit(self, images: Tensor) -> Tensor:
        """All of the image in its finest level but what the coarser ones hold; exact."""
        size = (images.shape[-2], images.shape[-1])
        plain = self.unsquash(images) / self.gain
        found = []
        for level in reversed(self.sizes(size)[1:]):
            coarse = F.interpolate(plain, level, mode="area")
            plain = plain - F.interpolate(coarse, size, mode="bilinear", align_corners=False)
            found.append(coarse.flatten(2))
        return torch.cat([plain.flatten(2), *reversed(found)], dim=2)

    def blurred(self, parameters: Tensor, sigma: float, size: Size) -> Tensor:
        """Each level blurred by what `sigma` is in its own pixels."""
        levels = self._split(parameters, size)
        return torch.cat([blur(x, sigma / 2**i).flatten(2) for i, x in enumerate(levels)], dim=2)

    def resized(self, parameters: Tensor, old: Size, new: Size) -> Tensor:
        """Each level interpolated."""
        levels = zip(self._split(parameters, old), self.sizes(new), strict=True)
        return torch.cat([F.interpolate(x, s, mode="bilinear").flatten(2) for x, s in levels], dim=2)


@CANVASES.add("maco")
@dataclasses.dataclass(frozen=True)
class Maco(Parameterization):
    """Phases only: amplitudes are fixed to those of photographs, so that no frequency can be exaggerated.

    Fel et al. 2023, "Unlocking Feature Visualization for Deeper Networks with MAgnitude Constrained
    Optimization". `spectrum` is the file of amplitudes: `default`, or one from `atlas spectrum`; its colour
    matrix is the one that its amplitudes were measured under. `contrast` multiplies all of them.
    """

    sd: float = 1.0
    contrast: float = 1.0
    colour: str = "measured"

    can_blur: ClassVar[bool] = False
    can_grow: ClassVar[bool] = False

    def check(self, channels: int) -> None:
        """Also: the spectrum's channels are the network's and its colours are used."""
        super().check(channels)
        if self.colour != "measured":
            raise AtlasError("render.canvas.colour must be measured for maco: its amplitudes belong to those colours.")

    def start(self, generator: Generator, channels: int, size: Size) -> Tensor:
        """(C, H, W // 2 + 1) Gaussian phases in radians; frequency 0 begins at the photographs' mean."""
        phase = torch.randn(channels, size[0], size[1] // 2 + 1, generator=generator) * self.sd
        phase[:, 0, 0] = torch.from_numpy(np.where(self.measured.mean < 0, np.pi, 0.0).astype(np.float32))
        return phase

    def image(self, parameters: Tensor, size: Size) -> Tensor:
        """(B, C, H, W // 2 + 1) phases → (B, C, H, W) in (0, 1)."""
        amplitude = self.measured.at(*size).to(parameters) * self.contrast
        spectrum = torch.polar(amplitude.expand_as(parameters), parameters)
        return self.squash(torch.fft.irfft2(spectrum, s=size, norm="ortho"))

    def fit(self, images: Tensor) -> Tensor:
        """The phases of the unsquashed image: what is left of it under natural amplitudes."""
        return torch.fft.rfft2(self.unsquash(images), norm="ortho").angle()


@CANVASES.add("image")
@dataclasses.dataclass(frozen=True)
class FromImage(Fourier):
    """The Fourier canvas, started from a photograph instead of from noise.

    `source` is a picture's file, or `best`: the unit's own best dataset example, cut to the canvas around what
    excited it. `sd` is the noise added to the start, `penalties=prior` pulls back to it.
    """

    source: ConfigFile = ConfigFile("best")
    sd: float = 0.0

    @property
    def best(self) -> bool:
        """True for the unit's own best example."""
        return self.source.path == "best"

    def wants(self, field: str) -> bool:
        """`best` is no file."""
        return super().wants(field) and not (field == "source" and self.best)


def frame(image: np.ndarray, size: Size, centre: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """(h, w, C) uint8 → (C, height, width) in [0, 1]: the part around `centre` (shares of height and width).

    A smaller photograph is enlarged until it covers the canvas; none is ever shrunk, as features have a size.
    """
    found = torch.from_numpy(np.ascontiguousarray(image)).float().div(255).permute(2, 0, 1)[None]
    grow = max(size[0] / found.shape[2], size[1] / found.shape[3])
    if grow > 1:
        wider = (max(size[0], round(found.shape[2] * grow)), max(size[1], round(found.shape[3] * grow)))
        found = F.interpolate(found, wider, mode="bilinear", align_corners=False)
    place = []
    for length, wanted, share in zip(found.shape[2:], size, centre, strict=True):
        place.append(min(max(round(share * length - wanted / 2), 0), length - wanted))
    return found[0, :, place[0] : place[0] + size[0], place[1] : place[1] + size[1]]
