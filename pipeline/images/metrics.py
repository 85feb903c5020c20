"""Metrics of finished images: roughness, regularity, naturalness, and specificity to the unit.

Each is computed from saved images, (B, C, H, W) in [0, 1], or from the activations of a layer for them, and gives one
number for each image. No metric is part of the optimization: a metric that is optimized is no longer a measurement.
Metrics of the images alone are computed in double precision, so that they are equal on all machines and in all batches:
on the device of the images if it is fast in double precision, else on the CPU.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.acceleration.precision import capability_of, float64_device
from pipeline.core.metric_specs import MIN_DEVIATION
from pipeline.data.natural_spectrum import LOGIT_MARGIN, Spectrum
from pipeline.kernels.transfers import constant_like

# High frequencies are those above this number of cycles per pixel, which an image of half the size could not contain.
HIGH_FREQUENCY = 0.25
# Values at most this far from 0 or 1 are saturated. Images of a sigmoid never reach the ends themselves.
SATURATION_MARGIN = 0.05
# Weights of red, green and blue in luminance (ITU-R BT.709).
LUMINANCE = (0.2126, 0.7152, 0.0722)
# Number of rings of the amplitude spectrum, each a third of an octave wide, from 1/32 to 1/2 cycles per pixel.
RINGS = 12
# Energy below which an image is constant in double precision.
MIN_ENERGY = 1e-12


def image_metrics(images: Tensor, strides: Sequence[int], natural: Spectrum) -> dict[str, Tensor]:
    """Compute all metrics of `metric_specs.IMAGE_METRICS` that depend on the images alone.

    Args:
        images: (B, C, H, W) in [0, 1].
        strides: Strides of the network, for `checkerboard`.
        natural: Mean spectrum of natural images, for `spectral_distance`.

    Returns:
        (B,) float64 values by name.
    """
    images = images.to(float64_device(images.device, capability_of(images.device))).double()
    energy = power(images)
    return {
        "high_frequency": high_frequency(energy),
        "checkerboard": checkerboard(energy, strides),
        "total_variation": total_variation(images),
        "spectral_distance": spectral_distance(images, natural),
        "saturation": saturation(images),
        **appearance(images),
    }


def strides(stride: int) -> tuple[int, ...]:
    """Return the strides of a network up to a layer of total stride `stride`: powers of 2 up to 32, and `stride`."""
    strides = {power for power in (2, 4, 8, 16, 32) if power <= stride}
    if stride >= 2:
        strides.add(stride)
    return tuple(sorted(strides))


def power(images: Tensor) -> Tensor:
    """Return the energy at each frequency, |FFT|² summed over channels: (B, C, H, W) → (B, H, W) in FFT order.

    The mean is subtracted. A Hann window reduces the leakage caused by opposite edges that differ.
    """
    return torch.fft.fft2(_windowed(images)).abs().square().sum(1)


def _windowed(images: Tensor) -> Tensor:
    """Return images times a Hann window, after subtraction of their windowed mean."""
    window = _window(images.shape[-2], images.shape[-1], images.dtype, images.device)
    return (images - (images * window).sum(dim=(2, 3), keepdim=True) / window.sum()) * window


# What depends on the size of the images alone is kept for some sizes: a GPU would wait for each upload.
_cached = functools.lru_cache(maxsize=256)


@_cached
def _window(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a Hann window, (height, width)."""
    # The window is sampled at half-integer positions, so that no row or column has a weight of 0.
    down, across = (torch.sin(torch.pi * (torch.arange(n).double() + 0.5) / n).square() for n in (height, width))
    return (down[:, None] * across).to(device, dtype)


def _frequencies(height: int, width: int) -> Tensor:
    """Return the frequencies in cycles per pixel, (H, W) in FFT order."""
    return torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width))


def high_frequency(energy: Tensor) -> Tensor:
    """Return the fraction of the energy at more than ¼ cycle per pixel.

    Σ_{|f| > ¼} P(f) ÷ Σ P(f). White noise has 1 − π/16 = 0.80, natural images 0.01 to 0.15, a constant image 0.
    Source: Olah, Mordvintsev & Schubert 2017, "The Enemy of Feature Visualization", which calls such patterns noise
    and shows their spectrum.

    Args:
        energy: (B, H, W) from `power`.

    Returns:
        (B,) in 0 … 1.
    """
    above = _above_high_frequency(energy.shape[-2], energy.shape[-1], energy.dtype, energy.device)
    return (energy * above).sum(dim=(1, 2)) / energy.sum(dim=(1, 2)).clamp(min=MIN_ENERGY)


@_cached
def _above_high_frequency(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return 1 at the frequencies above `HIGH_FREQUENCY` and 0 at the others, (height, width) in FFT order."""
    return (_frequencies(height, width) > HIGH_FREQUENCY).to(device, dtype)


def checkerboard(energy: Tensor, strides: Sequence[int]) -> Tensor:
    """Return the energy at the frequencies of the network's strides relative to that of neighboring frequencies.

    For each stride s, the frequencies are (1/s, 0), (0, 1/s) and (1/s, 1/s) cycles per pixel. For each of them, the
    mean of P over it and its 8 neighbors, as the window spreads a line that far, is divided by the mean over the ring
    of frequencies 2 to 4 away. The result is the maximum of these ratios. White noise has 1.7 and natural images 1.3 to
    5, as it is a maximum; at 10, a lattice has ten times the energy of neighboring frequencies. Strides above a quarter
    of the image cannot be distinguished from its content and are ignored. Source: Odena, Dumoulin & Olah 2016,
    "Deconvolution and Checkerboard Artifacts", explain how strided convolutions cause such lattices in gradients; the
    index itself is not from the literature.

    Args:
        energy: (B, H, W) from `power`.
        strides: Strides of the network in pixels.

    Returns:
        (B,), at least 0; 0 if all strides are ignored.
    """
    height, width = energy.shape[-2:]
    ratios = [energy.new_zeros(len(energy))]
    for stride in strides:
        if stride < 2 or 4 * stride > min(height, width):
            continue
        for vertical, horizontal in ((1, 0), (0, 1), (1, 1)):
            row, column = round(vertical * height / stride), round(horizontal * width / stride)
            peak, ring = (_ring_mean(energy, (row, column), ring) for ring in ((0, 1), (2, 4)))
            ratios.append(torch.where(ring > MIN_ENERGY, peak / ring.clamp(min=MIN_ENERGY), 0.0))
    return torch.stack(ratios).amax(0)


def _ring_mean(energy: Tensor, centre: tuple[int, int], ring: tuple[int, int]) -> Tensor:
    """Return the mean of periodic (B, H, W) over the positions within a range of Chebyshev distances from a centre."""
    rows, columns = _ring_positions((energy.shape[-2], energy.shape[-1]), centre, ring, energy.device)
    return energy[:, rows, columns].mean(1)


@_cached
def _ring_positions(
    size: tuple[int, int], centre: tuple[int, int], ring: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of the positions at distances from `ring[0]` to `ring[1]`, both included."""
    offsets = [
        (i, j) for i, j in itertools.product(range(-ring[1], ring[1] + 1), repeat=2) if max(abs(i), abs(j)) >= ring[0]
    ]
    rows, columns = zip(*(((centre[0] + i) % size[0], (centre[1] + j) % size[1]) for i, j in offsets), strict=True)
    return torch.tensor(rows, device=device), torch.tensor(columns, device=device)


def total_variation(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbors below and to the right, (B, C, H, W) → (B,) in 0 … 1.

    ½ mean |x[i+1, j] − x[i, j]| + ½ mean |x[i, j+1] − x[i, j]|, in units of full contrast. Source: Rudin, Osher &
    Fatemi 1992; Mahendran & Vedaldi 2015, with β = 1.
    """
    zero = images.new_zeros(len(images))
    down, right = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    parts = (part.mean(dim=(1, 2, 3)) if part.numel() else zero for part in (down, right))
    return torch.stack(list(parts)).mean(0)


def saturation(images: Tensor) -> Tensor:
    """Return the fraction of values within 0.05 of 0 or 1, (B, C, H, W) → (B,) in 0 … 1; natural images have 0.06.

    These values can hardly increase or decrease further, although the objective might rise.
    """
    at_ends = (images <= SATURATION_MARGIN + 1e-6) | (images >= 1 - SATURATION_MARGIN - 1e-6)
    return at_ends.to(images.dtype).mean(dim=(1, 2, 3))


def appearance(images: Tensor) -> dict[str, Tensor]:
    """Return contrast and chroma of images, the same for visualizations and dataset images.

    `contrast` is the standard deviation of luminance over the pixels, 0 … 0.5 (ITU-R BT.709 weights on the encoded
    values; of images without three channels, their mean). `chroma` is the mean over the pixels of the largest minus the
    smallest color value, 0 … 1 (the chroma of the HSV model); NaN for images without three channels.

    Args:
        images: (B, C, H, W) in [0, 1].

    Returns:
        (B,) by name.
    """
    if images.shape[1] != 3:
        chroma = images.new_full((len(images),), torch.nan)
        return {"contrast": images.mean(1).flatten(1).std(1, correction=0), "chroma": chroma}
    luminance = torch.einsum("c,bchw->bhw", constant_like(images, LUMINANCE), images)
    chroma = (images.amax(1) - images.amin(1)).flatten(1).mean(1)
    return {"contrast": luminance.flatten(1).std(1, correction=0), "chroma": chroma}


def spectral_distance(images: Tensor, natural: Spectrum) -> Tensor:
    """Return the distance of the amplitude spectrum from that of natural images, in decades.

    With a(r) the log₁₀ of the mean |FFT| in ring r of frequencies (thirds of octaves from 1/32 to 1/2 cycles per pixel)
    and d = a_image − a_natural: √ mean (d − mean d)², which does not depend on contrast. It is computed from the color
    axis of the largest variance (lightness) in decorrelated logit space, as in `Spectrum`; for images with another
    number of channels, from the mean of the channels. The mean natural image has 0, single ones have 0.04 to 0.2, white
    noise 0.53. Source: Field 1987, amplitudes of natural images fall as 1/f; Fel et al. 2023 (MACO) constrain
    visualizations to that spectrum.

    Args:
        images: (B, C, H, W) in [0, 1].
        natural: Mean spectrum of natural images.

    Returns:
        (B,), at least 0; NaN if the images are too small for two rings.
    """
    height, width = images.shape[-2:]
    same_channels = images.shape[1] == len(natural.colour)
    axis = torch.logit(
        (images if same_channels else images.mean(1, keepdim=True)).clamp(LOGIT_MARGIN, 1 - LOGIT_MARGIN)
    )
    if same_channels:
        lightness = torch.linalg.inv(torch.from_numpy(natural.colour).double())[0].to(images)
        axis = torch.einsum("c,bchw->bhw", lightness, axis)[:, None]
    rings = _rings(height, width, images.dtype, images.device)
    if len(rings) < 2:
        return images.new_full((len(images),), torch.nan)
    amplitude = torch.fft.rfft2(_windowed(axis), norm="ortho").abs()[:, 0]
    difference = _ring_levels(amplitude, rings) - _ring_levels(natural.at(height, width)[:1].to(images), rings)
    return (difference - difference.mean(1, keepdim=True)).square().mean(1).sqrt()


@_cached
def _rings(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return weights that average a real spectrum over rings, (rings, H · (W // 2 + 1)); empty rings are omitted."""
    radii = _frequencies(height, width)[:, : width // 2 + 1].reshape(-1).double()
    edges = torch.logspace(-5, -1, RINGS + 1, 2.0, dtype=torch.float64)
    inside = torch.stack([(radii >= low) & (radii < high) for low, high in itertools.pairwise(edges.tolist())]).double()
    inside = inside[inside.any(1)]
    return (inside / inside.sum(1, keepdim=True)).to(device, dtype)


def _ring_levels(amplitude: Tensor, rings: Tensor) -> Tensor:
    """Return the log₁₀ of the mean amplitude in each ring, (B, rings)."""
    return (amplitude.flatten(1) @ rings.T).clamp(min=1e-8).log10()


def own_activations(maps: Tensor, channels: Tensor, negative: bool) -> dict[str, Tensor]:
    """Return the peak and the mean of each visualized channel's activation map, for the activation ratios.

    Args:
        maps: (B, C, positions) activations of a layer.
        channels: (B,) visualized channels.
        negative: Whether the visualizations minimize the activation; the peak is then the smallest activation.

    Returns:
        (B,) `peak` and `spatial_mean`.
    """
    own = maps[torch.arange(len(maps), device=maps.device), channels]
    return {"peak": own.amin(1) if negative else own.amax(1), "spatial_mean": own.mean(1)}


def margin(responses: Tensor, channels: Tensor, natural: Tensor) -> Tensor:
    """Return by how many standard deviations the visualized channel exceeds all other channels of its layer.

    z_c − max over d ≠ c of z_d, with z = (r − mean) / sd of each channel's maximum activation over dataset images. It
    is positive if no other channel is further above its usual activation. Channels that do not vary over the dataset
    have no z and are left out. In contrast to the rank of the raw activations, which is 1 for almost every
    visualization, it does not depend on the scales of the channels.

    Args:
        responses: (G, V, C) maximum activations for V visualizations of G units.
        channels: (G,) visualized channels.
        natural: (n, C) maximum activations for n dataset images.

    Returns:
        (G, V) in standard deviations; NaN for a missing image, a channel that does not vary, or fewer than two images.
    """
    scores = _Scores.over(natural)
    z, varies = scores.of(responses), scores.varies
    rows = torch.arange(len(responses), device=responses.device)
    own = z[rows, :, channels]
    others = z.masked_fill(~varies, -torch.inf)
    others[rows, :, channels] = -torch.inf
    result = own - others.amax(2)
    return torch.where(varies[channels][:, None] & result.isfinite(), result, torch.nan)


@dataclasses.dataclass(frozen=True)
class _Scores:
    """Standard scores of C channels over dataset images.

    Attributes:
        mean: Mean of each channel, (C,); NaN for fewer than two images.
        sd: Standard deviation, (C,); 1 for channels that do not vary.
        varies: Whether the channel varies over the images (`MIN_DEVIATION`), (C,); all for fewer than two, so that
            scores are NaN.
    """

    mean: Tensor
    sd: Tensor
    varies: Tensor

    @classmethod
    def over(cls, natural: Tensor) -> "_Scores":
        """Measure the channels on (n, C) activations for n images."""
        if len(natural) < 2:
            unknown = natural.new_full((natural.shape[1],), torch.nan)
            return cls(unknown, unknown, torch.ones(natural.shape[1], dtype=torch.bool))
        sd = natural.std(0)
        varies = sd > MIN_DEVIATION * sd.median().clamp(min=torch.finfo(sd.dtype).tiny)
        return cls(natural.mean(0), sd.where(varies, torch.ones(())), varies)

    def of(self, responses: Tensor) -> Tensor:
        """Return the scores of (…, C) activations; 0 for channels that do not vary, NaN for fewer than two images."""
        return torch.where(self.varies, (responses - self.mean) / self.sd, 0.0)


def agreement(responses: Tensor) -> Tensor:
    """Return how similar the variants of a unit are in the activation space of the layer.

    Mean cosine between the activations r_v of a variant and those of the other variants of the unit, after subtraction
    of the mean m over all G · V images: mean_w cos(r_v − m, r_w − m). It is 1 for equal activations, and 0 for variants
    that are as similar as images of two different units. Source: Olah, Mordvintsev & Schubert 2017, "Diversity",
    compare the variants of a unit by cosines in the layer; centered as in Kornblith et al. 2019 (CKA).

    Args:
        responses: (G, V, C) activations for V variants of G units; NaN for a missing image.

    Returns:
        (G, V) in −1 … 1; NaN for a unit with a missing image, for V = 1, and if there are images of a single unit only.
    """
    available = ~responses.isnan().any(2)
    if responses.shape[1] < 2 or int(available.any(1).sum()) < 2:
        return responses.new_full(responses.shape[:2], torch.nan)
    directions = torch.nn.functional.normalize(responses - responses[available].mean(0), dim=2)
    cosine = directions @ directions.transpose(1, 2)
    num_others = responses.shape[1] - 1
    return (cosine.sum(2) - cosine.diagonal(dim1=1, dim2=2)) / num_others


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Similarity of activations to those for the best dataset examples of a unit; see `transfer`.

    Attributes:
        value: Of the V visualizations of G units, (G, V).
        ceiling: Of the unit's dataset examples, each with the mean of the others, (G,).
        floor: Of random dataset images: the 95th percentile, (G,).
    """

    value: Tensor
    ceiling: Tensor
    floor: Tensor


# Percentile of random images that is the floor of `transfer`: 5 % of them are more similar to the examples.
FLOOR = 0.95


def transfer(responses: Tensor, channels: Tensor, examples: Tensor, natural: Tensor) -> Transfer:
    """Return how similar the activations for a visualization are to those for the unit's best dataset examples.

    cos(z(r), z(n)) over all channels of the layer except the unit's own, with the maximum activations r for the image
    and n for the best dataset examples (their mean), both as standard scores z over random dataset images. The unit's
    own channel is left out because the image was optimized for it and the examples were chosen by it: it alone would
    make them similar. An image that activates the unit in another way than dataset images do has a low value, whatever
    its activation. The value has a meaning between two others: the similarity of one dataset example to the rest
    (ceiling), and of random dataset images (floor). After Geirhos et al. 2023, "Don't trust your eyes" (arXiv
    2306.04719), who compare natural images with each other in the same way.

    Args:
        responses: (G, V, C) activations for V visualizations of G units.
        channels: (G,) channel of each unit.
        examples: (G, k, C) activations for the best dataset examples of each unit; NaN where there are fewer.
        natural: (n, C) activations for random dataset images.

    Returns:
        Values in −1 … 1; NaN where activations are missing, and everywhere if there are fewer than two random images.
    """
    scores = _Scores.over(natural)
    z, z_examples = scores.of(responses), scores.of(examples)
    # Without the unit's own channel: a mask of ones and a zero for each unit.
    others = scores.varies.to(z).expand(len(channels), -1).clone()
    others[torch.arange(len(channels)), channels] = 0
    mean = z_examples.nanmean(1)
    available = ~z_examples.isnan().any(2)
    count = available.sum(1)
    known = z_examples.nan_to_num()
    rest = (known.sum(1, keepdim=True) - known) / (count - 1).clamp(min=1)[:, None, None]
    each = _cosine(z_examples, rest, others).where(available & (count > 1)[:, None], torch.tensor(torch.nan))
    return Transfer(_cosine(z, mean[:, None], others), each.nanmean(1), _floor(scores.of(natural), mean, channels))


def _floor(natural: Tensor, mean: Tensor, channels: Tensor) -> Tensor:
    """Return the percentile `FLOOR` of the cosines of (n, C) with each row of (G, C), without the row's own channel."""
    if not len(natural):
        return torch.full((len(mean),), torch.nan)
    own_natural, own = natural[:, channels], mean.gather(1, channels[:, None])[:, 0]
    products = natural @ mean.T - own_natural * own
    squares = (natural.square().sum(1, keepdim=True) - own_natural.square()) * (mean.square().sum(1) - own.square())
    return (products / squares.clamp(min=0).sqrt()).nanquantile(FLOOR, 0)


def _cosine(a: Tensor, b: Tensor, others: Tensor) -> Tensor:
    """Return the cosines of (G, n, C) with (G, 1 or n, C) over the channels where `others` (G, C) is 1."""
    a, b = a * others[..., None, :], b * others[..., None, :]
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def quantile_among(values: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Return the share of a sample below each value, ties counting half; NaN for NaN and for an empty sample."""
    ordered = np.sort(sample[np.isfinite(sample)])
    if not len(ordered):
        return np.full(values.shape, np.nan, np.float32)
    below = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return np.where(np.isnan(values), np.nan, below / (2 * len(ordered))).astype(np.float32)


def to_float16(activations: Tensor) -> np.ndarray:
    """Convert activations to float16 for storage, clamped to its range of ±65504."""
    return clamped_half(activations).cpu().numpy()


def clamped_half(activations: Tensor) -> Tensor:
    """Return activations as float16 on their device, clamped to its range of ±65504."""
    largest = torch.finfo(torch.float16).max
    return activations.clamp(-largest, largest).half()


def example_activations(examples: np.ndarray, index: np.ndarray, activations: np.ndarray) -> np.ndarray:
    """Return the activations of a layer for the dataset examples of each unit.

    Args:
        examples: (G, k) numbers of the dataset images; −1 for none. Images that `index` does not contain are ignored.
        index: (m,) numbers of the dataset images that `activations` belong to.
        activations: (m, C).

    Returns:
        (G, k, C) float32; NaN where there is no example.
    """
    order = np.argsort(index, kind="stable")
    positions = np.searchsorted(index, examples, sorter=order).clip(max=max(len(index) - 1, 0))
    found = np.full((*examples.shape, activations.shape[1]), np.nan, np.float32)
    if len(index):
        rows = order[positions]
        available = (examples >= 0) & (index[rows] == examples)
        found[available] = activations[rows[available]]
    return found
