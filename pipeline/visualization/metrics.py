"""Metrics of finished images: roughness, regularity, naturalness, and specificity to the unit.

Each is computed from saved images, (B, C, H, W) in [0, 1], or from the activations of a layer for them, and gives one
number for each image. No metric is part of the optimization: a metric that is optimized is no longer a measurement.
Metrics of the images alone are computed in double precision, so that they are equal on all machines and in all batches.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.data.natural_spectrum import LOGIT_MARGIN, Spectrum

# High frequencies are those above this number of cycles per pixel, which an image of half the size could not contain.
HIGH_FREQUENCY = 0.25
# Values at most this far from 0 or 1 are saturated.
SATURATION_MARGIN = 2 / 255
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
    images = images.double()
    energy = power(images)
    return {
        "high_frequency": high_frequency(energy),
        "checkerboard": checkerboard(energy, strides),
        "total_variation": total_variation(images),
        "spectral_distance": spectral_distance(images, natural),
        "saturated": saturated(images),
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
    height, width = images.shape[-2:]
    # The window is sampled at half-integer positions, so that no row or column has a weight of 0.
    down, across = (torch.sin(torch.pi * (torch.arange(n).double() + 0.5) / n).square() for n in (height, width))
    window = (down[:, None] * across).to(images)
    return (images - (images * window).sum(dim=(2, 3), keepdim=True) / window.sum()) * window


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
    above = (_frequencies(*energy.shape[-2:]) > HIGH_FREQUENCY).to(energy)
    return (energy * above).sum(dim=(1, 2)) / energy.sum(dim=(1, 2)).clamp(min=MIN_ENERGY)


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
            peak, ring = _ring_mean(energy, row, column, 0, 1), _ring_mean(energy, row, column, 2, 4)
            ratios.append(torch.where(ring > MIN_ENERGY, peak / ring.clamp(min=MIN_ENERGY), 0.0))
    return torch.stack(ratios).amax(0)


def _ring_mean(energy: Tensor, row: int, column: int, inner: int, outer: int) -> Tensor:
    """Return the mean of periodic (B, H, W) over the positions at Chebyshev distances `inner` to `outer` from one."""
    height, width = energy.shape[-2:]
    rows, columns = [], []
    for i, j in itertools.product(range(-outer, outer + 1), repeat=2):
        if max(abs(i), abs(j)) >= inner:
            rows.append((row + i) % height)
            columns.append((column + j) % width)
    return energy[:, rows, columns].mean(1)


def total_variation(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbors below and to the right, (B, C, H, W) → (B,) in 0 … 1.

    ½ mean |x[i+1, j] − x[i, j]| + ½ mean |x[i, j+1] − x[i, j]|, in units of full contrast. Source: Rudin, Osher &
    Fatemi 1992; Mahendran & Vedaldi 2015, with β = 1.
    """
    zero = images.new_zeros(len(images))
    down, right = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    parts = (part.mean(dim=(1, 2, 3)) if part.numel() else zero for part in (down, right))
    return torch.stack(list(parts)).mean(0)


def saturated(images: Tensor) -> Tensor:
    """Return the fraction of values within 2/255 of 0 or 1, (B, C, H, W) → (B,) in 0 … 1.

    These values cannot increase or decrease further, although the objective might rise.
    """
    return (
        ((images <= SATURATION_MARGIN + 1e-6) | (images >= 1 - SATURATION_MARGIN - 1e-6))
        .to(images.dtype)
        .mean(dim=(1, 2, 3))
    )


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
    rings = _rings(height, width).to(images)
    if len(rings) < 2:
        return images.new_full((len(images),), torch.nan)
    amplitude = torch.fft.rfft2(_windowed(axis), norm="ortho").abs()[:, 0]
    difference = _ring_levels(amplitude, rings) - _ring_levels(natural.at(height, width)[:1].to(images), rings)
    return (difference - difference.mean(1, keepdim=True)).square().mean(1).sqrt()


def _rings(height: int, width: int) -> Tensor:
    """Return weights that average a real spectrum over rings, (rings, H · (W // 2 + 1)); empty rings are omitted."""
    radii = _frequencies(height, width)[:, : width // 2 + 1].reshape(-1).double()
    edges = torch.logspace(-5, -1, RINGS + 1, 2.0, dtype=torch.float64)
    inside = torch.stack([(radii >= low) & (radii < high) for low, high in itertools.pairwise(edges.tolist())]).double()
    inside = inside[inside.any(1)]
    return inside / inside.sum(1, keepdim=True)


def _ring_levels(amplitude: Tensor, rings: Tensor) -> Tensor:
    """Return the log₁₀ of the mean amplitude in each ring, (B, rings)."""
    return (amplitude.flatten(1) @ rings.T).clamp(min=1e-8).log10()


def rank(responses: Tensor, channels: Tensor) -> Tensor:
    """Return the rank of the visualized channel among all channels of its layer, by their activation for the image.

    1 + number of channels with a higher activation. Channels with equal activations share the better rank.

    Args:
        responses: (B, C) activations.
        channels: (B,) visualized channels.

    Returns:
        (B,) float64 in 1 … C; NaN where the visualized channel's activation is NaN.
    """
    visualized = responses.gather(1, channels[:, None])
    ranks = (responses > visualized).sum(1).double() + 1
    return ranks.masked_fill(visualized[:, 0].isnan(), torch.nan)  # nothing is greater than NaN: it would rank first


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


def transfer(responses: Tensor, natural: Tensor, baseline: Tensor) -> Tensor:
    """Return how similar the activations for a visualization are to those for the best dataset examples of the unit.

    cos(r − u, n − u) with the activations r for the image, n for the best dataset examples, and u for arbitrary dataset
    images. An image that activates the unit in another way than dataset images do has a low value, whatever its
    activation. Source: Geirhos et al. 2023, "Don't trust your eyes", who test in this way whether visualizations are
    processed like natural images.

    Args:
        responses: (G, V, C) activations for V variants of G units.
        natural: (G, C) mean activations for the best dataset examples of each unit.
        baseline: (C,) mean activations over the dataset.

    Returns:
        (G, V) in −1 … 1; NaN where an argument is NaN.
    """
    visualization = responses - baseline
    examples = (natural - baseline)[:, None].expand_as(responses)
    cosine = torch.nn.functional.cosine_similarity(visualization, examples, dim=2)
    return torch.where((visualization.isnan() | examples.isnan()).any(2), torch.nan, cosine)


def to_float16(activations: Tensor) -> np.ndarray:
    """Convert activations to float16 for storage, clamped to its range of ±65504."""
    largest = torch.finfo(torch.float16).max
    return activations.clamp(-largest, largest).half().cpu().numpy()


def mean_activations(examples: np.ndarray, index: np.ndarray, activations: np.ndarray) -> np.ndarray:
    """Return the mean activations of a layer over the dataset examples of each unit.

    Args:
        examples: (G, k) numbers of the dataset images; −1 for none. Images that `index` does not contain are ignored.
        index: (m,) numbers of the dataset images that `activations` belong to.
        activations: (m, C).

    Returns:
        (G, C) float32; NaN for a unit without examples.
    """
    order = np.argsort(index, kind="stable")
    positions = np.searchsorted(index, examples, sorter=order).clip(max=max(len(index) - 1, 0))
    rows = order[positions] if len(index) else np.zeros(examples.shape, int)
    available = (examples >= 0) & ((index[rows] == examples) if len(index) else False)
    means = np.full((len(examples), activations.shape[1]), np.nan, np.float32)
    for i in np.flatnonzero(available.any(1)):
        means[i] = activations[rows[i][available[i]]].astype(np.float32).mean(0)
    return means
