"""Image parameterizations: functions from the parameters that are optimized to an image in [0, 1].

`initial` draws the initial parameters of one image from a generator, so that they do not depend on the batch; `image`
maps a batch of parameters to images and `inverse` maps images to parameters. `blurred` and `resized` return the
parameters of the blurred or resized images, where the parameterization supports it.

All parameterizations end in the same function `to_rgb`: real-valued images in a decorrelated color space are multiplied
by a color matrix and passed through a sigmoid, so that the values of an image are always in (0, 1).
"""

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError
from pipeline.core.registry import ADDED_LATER, Registry
from pipeline.data.image_filters import blur, frequencies
from pipeline.data.natural_spectrum import Spectrum

CANVASES = Registry("canvas")

Size = tuple[int, int]

# Square root of the color covariance of ImageNet: lucid/optvis/param/color.py, divided by its largest column norm.
# Rows are R, G, B; columns are the decorrelated axes (lightness, blue–orange, green–magenta).
COLOR_MATRIX = (
    (0.5628, 0.1948, 0.0433),
    (0.5845, 0.0000, -0.1082),
    (0.5845, -0.1948, 0.0649),
)

ColorSpace = Literal["plain", "decorrelated", "measured"]
FourierNoise = Literal["coefficients", "pixels", "uniform", "phases"]

# `inverse` clamps images this far from 0 and 1, where the logit is infinite: a quarter of an 8-bit step.
EDGE = 1 / 1024


@dataclasses.dataclass(frozen=True)
class Parameterization:
    """Base class of image parameterizations.

    Attributes:
        colour: Color space of the parameters: "decorrelated" (lucid's matrix for 3 channels; no matrix for other
            numbers of channels), "plain" (no matrix), or "measured" (the matrix of `spectrum`).
        spectrum: File with the color matrix and the amplitude spectrum of a dataset, from `atlas spectrum`.
        packaged: File of the package that a `spectrum` of "default" stands for.
        can_blur: Whether `blurred` is supported.
        can_grow: Whether `resized` is supported.
        paired: Whether the last axis of the parameters holds real and imaginary parts.
    """

    colour: ColorSpace = "decorrelated"
    spectrum: ConfigFile = ConfigFile("default")

    packaged: ClassVar[str] = "data/natural_spectrum.npz"
    can_blur: ClassVar[bool] = True
    can_grow: ClassVar[bool] = True
    paired: ClassVar[bool] = False

    def uses_file(self, field: str) -> bool:
        """Return whether the file in a field is used."""
        return field != "spectrum" or self.colour == "measured"

    def check(self, channels: int) -> None:
        """Raise `AtlasError` for settings that are invalid, or invalid for a network of `channels` input channels."""
        if self.colour == "measured":
            self._check_channels(channels)

    def _check_channels(self, channels: int) -> None:
        measured_channels = len(self.measured.mean)
        if measured_channels != channels:
            raise AtlasError(
                f"render.canvas.spectrum={self.spectrum.path!r} has {measured_channels} channels, the network takes "
                f"{channels}. Measure a spectrum of the right images with `atlas spectrum model=… data.root=… out=…`."
            )

    @functools.cached_property
    def measured(self) -> Spectrum:
        """Content of the file `spectrum`."""
        return Spectrum.of(self.spectrum)

    def matrix(self, channels: int) -> Tensor | None:
        """Return the (C, C) matrix from decorrelated axes to colors; None for the identity."""
        if self.colour == "measured":
            return torch.from_numpy(self.measured.colour)
        return torch.tensor(COLOR_MATRIX) if self.colour == "decorrelated" and channels == 3 else None

    def to_rgb(self, decorrelated: Tensor) -> Tensor:
        """Map real-valued images in the decorrelated color space to colors in (0, 1), (B, C, H, W)."""
        matrix = _matrix(self, decorrelated.shape[1], decorrelated.dtype, decorrelated.device)
        if matrix is not None:
            decorrelated = (matrix @ decorrelated.flatten(2)).view_as(decorrelated)
        return torch.sigmoid(decorrelated)

    def from_rgb(self, images: Tensor) -> Tensor:
        """Return the inverse of `to_rgb` for images in [0, 1], (B, C, H, W)."""
        logits = torch.logit(images.clamp(EDGE, 1 - EDGE))
        matrix = self.matrix(logits.shape[1])
        if matrix is not None:
            logits = (torch.linalg.inv(matrix.double()).to(logits) @ logits.flatten(2)).view_as(logits)
        return logits

    def initial(self, generator: Generator, channels: int, size: Size) -> Tensor:
        """Draw the initial parameters of one image.

        Args:
            generator: Random number generator on the CPU.
            channels: Number of channels of the image.
            size: (height, width) in pixels.

        Returns:
            (…) parameters, without a batch axis.
        """
        raise NotImplementedError

    def image(self, parameters: Tensor, size: Size) -> Tensor:
        """Return the images of (B, …) parameters, (B, C, height, width) in (0, 1)."""
        raise NotImplementedError

    def project(self, parameters: Tensor) -> None:
        """Project parameters to their valid range, in place; called after every step."""

    def inverse(self, images: Tensor) -> Tensor:
        """Return the parameters of (B, C, height, width) images in [0, 1]."""
        raise NotImplementedError

    def blurred(self, parameters: Tensor, sigma: float, size: Size) -> Tensor:
        """Return the parameters after a Gaussian blur by `sigma` pixels, applied before `to_rgb`."""
        raise NotImplementedError

    def resized(self, parameters: Tensor, old: Size, new: Size) -> Tensor:
        """Return the parameters of the same images at another size."""
        raise NotImplementedError


# These are needed at every step: on a GPU they are copied there once.
@functools.lru_cache(maxsize=32)
def _matrix(canvas: Parameterization, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Return `canvas.matrix` on a device."""
    matrix = canvas.matrix(channels)
    return None if matrix is None else matrix.to(device, dtype)


@functools.lru_cache(maxsize=8)
def _amplitudes(canvas: Parameterization, size: Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the amplitude spectrum of images of (height, width) `size` on a device."""
    return canvas.measured.at(*size).to(device, dtype)


@CANVASES.add("pixel")
@dataclasses.dataclass(frozen=True)
class Pixel(Parameterization):
    """One parameter for each pixel and channel: the naive parameterization, which favors high frequencies.

    With `clip` the parameters are the pixels themselves, clamped to [0, 1] after every step, without sigmoid and color
    matrix, as in DeepDream and deepdraw. The initial image is noise of standard deviation `sd` about `mean`.
    """

    sd: float = 0.01
    mean: float = 0.5
    clip: bool = False
    colour: ColorSpace = "plain"

    def check(self, channels: int) -> None:
        """Also check that `clip` has plain colors, and the range of `mean`."""
        super().check(channels)
        if self.clip and self.colour != "plain":
            raise AtlasError("render.canvas.clip=true supports plain colors only: set render.canvas.colour=plain.")
        if not 0 < self.mean < 1:
            raise AtlasError(f"render.canvas.mean={self.mean} must lie between 0 and 1.")

    def initial(self, generator: Generator, channels: int, size: Size) -> Tensor:
        """Draw (C, H, W) Gaussian noise of standard deviation `sd` about `mean`."""
        noise = torch.randn(channels, *size, generator=generator) * self.sd
        if self.clip:
            return noise.add_(self.mean).clamp_(0, 1)
        return noise + math.log(self.mean / (1 - self.mean))

    def image(self, parameters: Tensor, size: Size) -> Tensor:
        """Return the images of (B, C, H, W) parameters, in (0, 1), or in [0, 1] with `clip`."""
        return parameters if self.clip else self.to_rgb(parameters)

    def project(self, parameters: Tensor) -> None:
        """With `clip`, clamp to [0, 1]."""
        if self.clip:
            parameters.clamp_(0, 1)

    def inverse(self, images: Tensor) -> Tensor:
        """Return the inverse of `to_rgb`; with `clip` the images themselves."""
        return images.clone() if self.clip else self.from_rgb(images)

    def blurred(self, parameters: Tensor, sigma: float, size: Size) -> Tensor:
        """Return the parameters blurred as an image."""
        return blur(parameters, sigma)

    def resized(self, parameters: Tensor, old: Size, new: Size) -> Tensor:
        """Return the parameters interpolated bilinearly, with antialiasing."""
        return F.interpolate(parameters, new, mode="bilinear", antialias=True)


@CANVASES.add("fourier")
@dataclasses.dataclass(frozen=True)
class Fourier(Parameterization):
    """Fourier coefficients scaled by 1/f^decay, so that equal steps change all scales of a natural image equally.

    Olah, Mordvintsev & Schubert 2017, "Preconditioning and Parameterization"; constants of
    lucid/optvis/param/spatial.py (sd 0.01, decay 1, and its division by 4 as `gain`).

    `noise` is what an image starts from: Gaussian "coefficients" of standard deviation `sd`; or an image in the
    decorrelated color space with the standard deviation `sd`, of white Gaussian noise ("pixels"), of white noise with a
    uniform distribution ("uniform"), or with the amplitudes of natural images and random phases ("phases").
    """

    sd: float = 0.01
    noise: FourierNoise = dataclasses.field(default="coefficients", metadata=ADDED_LATER, kw_only=True)
    # With 1.2 images have up to 8 % more activation, a fifth to two fifths more contrast and chroma, and twenty times
    # as many values near black or white: more than most photographs.
    decay: float = 1.0
    gain: float = 0.25

    paired: ClassVar[bool] = True

    def uses_file(self, field: str) -> bool:
        """Return whether the file in a field is used."""
        return super().uses_file(field) or (field == "spectrum" and self.noise == "phases")

    def scale(self, size: Size, device: torch.device | None = None) -> Tensor:
        """Return the factor of each frequency, (H, W // 2 + 1)."""
        return frequencies(*size, device=device).clamp(min=1 / max(size)) ** -self.decay * self.gain

    def initial(self, generator: Generator, channels: int, size: Size) -> Tensor:
        """Draw (C, H, W // 2 + 1, 2) real and imaginary parts of the noise."""
        if self.noise == "coefficients":
            return torch.randn(channels, size[0], size[1] // 2 + 1, 2, generator=generator) * self.sd
        return self._parameters_of(self._noise_image(generator, channels, size)[None])[0]

    def _noise_image(self, generator: Generator, channels: int, size: Size) -> Tensor:
        """Draw an image of noise in the decorrelated color space, (C, H, W) with standard deviation `sd`."""
        if self.noise == "uniform":
            return (torch.rand(channels, *size, generator=generator) * 2 - 1) * (3**0.5 * self.sd)
        white = torch.randn(channels, *size, generator=generator)
        if self.noise == "pixels":
            return white * self.sd
        amplitudes = torch.fft.rfft2(white).abs().clamp(min=1e-12)
        natural = self.measured.at(*size)
        # The mean spectrum is of as many channels as its dataset; the first one is the lightness.
        natural = natural if len(natural) == channels else natural[:1]
        image = torch.fft.irfft2(torch.fft.rfft2(white) / amplitudes * natural, s=size)
        image = image - image.mean((1, 2), keepdim=True)
        return image / image.std() * self.sd

    def image(self, parameters: Tensor, size: Size) -> Tensor:
        """Return the images of (B, C, H, W // 2 + 1, 2) parameters, in (0, 1)."""
        spectrum = torch.view_as_complex(parameters * _scales(self, size, parameters.device).to(parameters))
        # norm="ortho" equals lucid's inverse transform times its factor sqrt(h·w).
        return self.to_rgb(torch.fft.irfft2(spectrum, s=size, norm="ortho"))

    def inverse(self, images: Tensor) -> Tensor:
        """Return the spectrum of the decorrelated image, divided by the scale."""
        return self._parameters_of(self.from_rgb(images))

    def _parameters_of(self, decorrelated: Tensor) -> Tensor:
        """Return the parameters of images in the decorrelated color space."""
        size = (decorrelated.shape[-2], decorrelated.shape[-1])
        spectrum = torch.fft.rfft2(decorrelated, norm="ortho")
        return torch.view_as_real(spectrum / self.scale(size, decorrelated.device)).contiguous()

    def blurred(self, parameters: Tensor, sigma: float, size: Size) -> Tensor:
        """Return the parameters times the Gaussian's transfer function exp(-2 (π σ f)²); edges wrap around."""
        transfer = torch.exp(-2 * (torch.pi * sigma * frequencies(*size, device=parameters.device)) ** 2)
        return parameters * transfer[..., None]

    def resized(self, parameters: Tensor, old: Size, new: Size) -> Tensor:
        """Return the spectrum zero-padded or cropped: each frequency stays the same in cycles per image."""
        spectrum = torch.view_as_complex(parameters.contiguous()) * self.scale(old, parameters.device)
        target = spectrum.new_zeros(*spectrum.shape[:2], new[0], new[1] // 2 + 1)
        rows, columns = min(old[0], new[0]), min(old[1], new[1]) // 2 + 1
        if min(old[1], new[1]) % 2 == 0:
            columns -= 1  # the Nyquist column has no phase of its own and no equivalent at another size
        low = (rows - 1) // 2
        target[:, :, : low + 1, :columns] = spectrum[:, :, : low + 1, :columns]
        target[:, :, new[0] - low :, :columns] = spectrum[:, :, old[0] - low :, :columns]
        # The orthonormal transform divides by the square root of the number of pixels.
        factor = (new[0] * new[1] / (old[0] * old[1])) ** 0.5
        return torch.view_as_real(target * factor / self.scale(new, parameters.device)).contiguous()


@functools.lru_cache(maxsize=8)
def _scales(canvas: Fourier, size: Size, device: torch.device) -> Tensor:
    """Return `canvas.scale` expanded to (H, W // 2 + 1, 2) in memory: broadcasting is slower."""
    return canvas.scale(size, device)[..., None].expand(-1, -1, 2).contiguous()


@CANVASES.add("laplacian")
@dataclasses.dataclass(frozen=True)
class Laplacian(Parameterization):
    """Laplacian pyramid: a sum of images, each half as large as the one before, resized to the size of the image.

    As `laplacian_pyramid_image` of lucid/optvis/param/spatial.py, which has 4 levels, sd 0.01 and divides by 3.
    Parameters are (C, N): the flattened levels, from fine to coarse.
    """

    sd: float = 0.01
    levels: int = 4
    gain: float = 0.333

    def check(self, channels: int) -> None:
        """Also check that there is at least one level."""
        super().check(channels)
        if self.levels < 1:
            raise AtlasError(f"render.canvas.levels={self.levels} is too small: at least 1.")

    def sizes(self, size: Size) -> list[Size]:
        """Return (height, width) of each level, from fine to coarse; at least 1 pixel."""
        return [(max(1, size[0] >> i), max(1, size[1] >> i)) for i in range(self.levels)]

    def initial(self, generator: Generator, channels: int, size: Size) -> Tensor:
        """Draw (C, N) Gaussian noise of standard deviation `sd`."""
        return torch.randn(channels, sum(h * w for h, w in self.sizes(size)), generator=generator) * self.sd

    def _split(self, parameters: Tensor, size: Size) -> list[Tensor]:
        """Return the levels as images, from fine to coarse: (B, C, N) → (B, C, height, width) each."""
        sizes = self.sizes(size)
        parts = parameters.split([h * w for h, w in sizes], dim=2)
        return [part.unflatten(2, s) for part, s in zip(parts, sizes, strict=True)]

    def image(self, parameters: Tensor, size: Size) -> Tensor:
        """Return the images of (B, C, N) parameters, in (0, 1)."""
        levels = self._split(parameters, size)
        total = levels[0]
        for level in levels[1:]:
            total = total + F.interpolate(level, size, mode="bilinear", align_corners=False)
        return self.to_rgb(total * self.gain)

    def inverse(self, images: Tensor) -> Tensor:
        """Return parameters that reproduce the images exactly: each level holds what coarser levels do not."""
        size = (images.shape[-2], images.shape[-1])
        remainder = self.from_rgb(images) / self.gain
        coarse_levels = []
        for level_size in reversed(self.sizes(size)[1:]):
            coarse = F.interpolate(remainder, level_size, mode="area")
            remainder = remainder - F.interpolate(coarse, size, mode="bilinear", align_corners=False)
            coarse_levels.append(coarse.flatten(2))
        return torch.cat([remainder.flatten(2), *reversed(coarse_levels)], dim=2)

    def blurred(self, parameters: Tensor, sigma: float, size: Size) -> Tensor:
        """Return the levels blurred, each by `sigma` converted to pixels of the level."""
        levels = self._split(parameters, size)
        return torch.cat([blur(x, sigma / 2**i).flatten(2) for i, x in enumerate(levels)], dim=2)

    def resized(self, parameters: Tensor, old: Size, new: Size) -> Tensor:
        """Return the levels interpolated bilinearly."""
        levels = zip(self._split(parameters, old), self.sizes(new), strict=True)
        return torch.cat([F.interpolate(x, s, mode="bilinear").flatten(2) for x, s in levels], dim=2)


@CANVASES.add("maco")
@dataclasses.dataclass(frozen=True)
class Maco(Parameterization):
    """Fourier phases; the amplitudes are fixed to the mean spectrum of natural images.

    Fel et al. 2023, "Unlocking Feature Visualization for Deeper Networks with MAgnitude Constrained
    Optimization". `spectrum` is the file of amplitudes: `default`, or a file from `atlas spectrum`. It also holds the
    color matrix that the amplitudes were measured with.

    With `standardize` the decorrelated image of all channels gets the mean 0 and the standard deviation `contrast`
    before the color matrix, as in the authors' Horama: mean amplitudes alone give less contrast than photographs have,
    as the mean of |F| is below the root of the mean of |F|². Without it `contrast` is a factor of all amplitudes.
    """

    sd: float = 1.0
    contrast: float = 1.0
    standardize: bool = True
    colour: ColorSpace = "measured"

    can_blur: ClassVar[bool] = False
    can_grow: ClassVar[bool] = False

    def check(self, channels: int) -> None:
        """Also check that the color matrix of the spectrum is used."""
        super().check(channels)
        if self.colour != "measured":
            raise AtlasError(
                "render.canvas.colour must be measured for maco: its amplitudes hold for the measured colors only."
            )

    def initial(self, generator: Generator, channels: int, size: Size) -> Tensor:
        """Draw (C, H, W // 2 + 1) Gaussian phases in radians; that of frequency 0 gives the mean of natural images."""
        phase = torch.randn(channels, size[0], size[1] // 2 + 1, generator=generator) * self.sd
        phase[:, 0, 0] = torch.from_numpy(np.where(self.measured.mean < 0, np.pi, 0.0).astype(np.float32))
        return phase

    def image(self, parameters: Tensor, size: Size) -> Tensor:
        """Return the images of (B, C, H, W // 2 + 1) phases, in (0, 1)."""
        amplitude = _amplitudes(self, size, parameters.dtype, parameters.device)
        spectrum = torch.polar(amplitude.expand_as(parameters), parameters)
        decorrelated = torch.fft.irfft2(spectrum, s=size, norm="ortho")
        if self.standardize:
            decorrelated = decorrelated - decorrelated.mean(dim=(1, 2, 3), keepdim=True)
            # The epsilon of Horama; the amplitudes are fixed, so that the deviation is far above it.
            decorrelated = decorrelated / (decorrelated.std(dim=(1, 2, 3), keepdim=True) + 1e-4)
        return self.to_rgb(decorrelated * self.contrast)

    def inverse(self, images: Tensor) -> Tensor:
        """Return the phases of the decorrelated image; its amplitudes are lost."""
        return torch.fft.rfft2(self.from_rgb(images), norm="ortho").angle()


@CANVASES.add("image")
@dataclasses.dataclass(frozen=True)
class FromImage(Fourier):
    """Fourier parameterization that starts from an image instead of noise.

    `source` is an image file, or `best`: the best dataset example of the unit, cropped around the position of the
    highest activation. `sd` is the standard deviation of the noise that is added to the initial parameters. The
    regularizers `prior` and `seed_distance` keep the visualization close to the initial image. With `preprocess` a file
    is first resized and cropped as the network's preprocessing does with dataset images; without, its pixels are used
    as they are. `dataset:PATH` is an image of the dataset, which is always preprocessed.
    """

    source: ConfigFile = ConfigFile("best")
    sd: float = 0.0
    preprocess: bool = dataclasses.field(default=False, metadata=ADDED_LATER)

    @property
    def best(self) -> bool:
        """Whether the initial image is the best dataset example of the unit."""
        return self.source.path == "best"

    def uses_file(self, field: str) -> bool:
        """Return whether the file in a field is used; `best` is not a file."""
        return super().uses_file(field) and not (field == "source" and self.best)


def frame(image: np.ndarray, size: Size, centre: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """Crop an image to a size.

    An image smaller than `size` is enlarged until it covers it. No image is ever reduced, as features have a size in
    pixels.

    Args:
        image: (H, W, C) uint8.
        size: (height, width) of the crop in pixels.
        centre: (y, x) of the center of the crop, as fractions of height and width. The crop is moved as far as needed
            to stay within the image.

    Returns:
        (C, height, width) in [0, 1].
    """
    pixels = torch.from_numpy(np.array(image)).float().div(255).permute(2, 0, 1)[None]
    factor = max(size[0] / pixels.shape[2], size[1] / pixels.shape[3])
    if factor > 1:
        enlarged = (max(size[0], round(pixels.shape[2] * factor)), max(size[1], round(pixels.shape[3] * factor)))
        pixels = F.interpolate(pixels, enlarged, mode="bilinear", align_corners=False)
    top = _crop_start(pixels.shape[2], size[0], centre[0])
    left = _crop_start(pixels.shape[3], size[1], centre[1])
    return pixels[0, :, top : top + size[0], left : left + size[1]]


def _crop_start(length: int, size: int, centre: float) -> int:
    """Return the first pixel of a crop of `size` pixels about `centre`, within an axis of `length` pixels."""
    return min(max(round(centre * length - size / 2), 0), length - size)
