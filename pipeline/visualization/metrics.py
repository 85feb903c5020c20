"""Measures of finished pictures: how rough, how regular, how natural they are, and whose pictures they are.

All take what is saved, (B, C, H, W) in [0, 1], or a layer's answers to it, and give one number a picture. None
enters the optimisation: a measure that is optimised measures nothing any more. Those of the picture alone are worked
out in double precision, so that the same picture has the same numbers on every machine and in every batch.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.data.natural_spectrum import EDGE, Spectrum

# Frequencies above so many cycles a pixel count as high: what a picture half as large could not have.
HIGH = 0.25
# Values so near to black or white count as saturated.
NEAR = 2 / 255
# Rings of the amplitude spectrum, a third of an octave each, from 1/32 to 1/2 cycles a pixel.
RINGS = 12
# Energy of what is plain to double precision.
NOTHING = 1e-12


def of_pictures(images: Tensor, strides: Sequence[int], photographs: Spectrum) -> dict[str, Tensor]:
    """Every one of `MEASURES` that needs only the pictures, (B, C, H, W) → (B,) each, float64."""
    images = images.double()
    energy = power(images)
    return {
        "high_frequency": high_frequency(energy),
        "checkerboard": checkerboard(energy, strides),
        "total_variation": total_variation(images),
        "spectral_distance": spectral_distance(images, photographs),
        "saturated": saturated(images),
    }


def strides(own: int) -> tuple[int, ...]:
    """Strides of a network up to a layer whose units are `own` pixels apart: powers of two up to 32, and its own."""
    return tuple(sorted({s for s in (2, 4, 8, 16, 32) if s <= own} | ({own} if own >= 2 else set())))


def power(images: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H, W): energy by frequency, |FFT|² summed over channels, without the mean, in FFT's order.

    Under a Hann window, which keeps edges that do not meet from spilling over all frequencies.
    """
    return torch.fft.fft2(_windowed(images)).abs().square().sum(1)


def _windowed(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    # Half a step in from both ends, so that no row or column counts for nothing, however small the picture.
    down, across = (torch.sin(torch.pi * (torch.arange(n).double() + 0.5) / n).square() for n in (height, width))
    window = (down[:, None] * across).to(images)
    return (images - (images * window).sum(dim=(2, 3), keepdim=True) / window.sum()) * window


def _frequencies(height: int, width: int) -> Tensor:
    """(H, W) cycles a pixel, in FFT's order."""
    return torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width))


def high_frequency(energy: Tensor) -> Tensor:
    """Share of the energy at more than ¼ cycle a pixel, (B, H, W) as `power` gives it → (B,), 0 … 1.

    Σ_{|f| > ¼} P(f) ÷ Σ P(f). White noise has 1 − π/16 = 0.80, photographs 0.01 to 0.15, a plain picture 0.
    Source: Olah, Mordvintsev & Schubert 2017, "The Enemy of Feature Visualization", which calls such patterns noise
    and shows their share in the spectrum.
    """
    above = (_frequencies(*energy.shape[-2:]) > HIGH).to(energy)
    return (energy * above).sum(dim=(1, 2)) / energy.sum(dim=(1, 2)).clamp(min=NOTHING)


def checkerboard(energy: Tensor, strides: Sequence[int]) -> Tensor:
    """Energy at the frequencies of the network's strides against their neighbours, (B, H, W) → (B,), from 0.

    For each stride s the frequencies (1/s, 0), (0, 1/s) and (1/s, 1/s) cycles a pixel. Of each the mean of P there and
    at the 8 frequencies around it, for the window spreads a line that far, ÷ the mean over the ring 2 to 4 frequencies
    away; the largest of these ratios is the index. White noise has 1.7 and photographs 1.3 to 5, for it is the largest
    of many; at 10 a lattice has ten times the energy of what surrounds it. Strides over a quarter of the picture can't
    be told from its content and are left out; without any stride left it is 0. Source: Odena, Dumoulin & Olah 2016,
    "Deconvolution and Checkerboard Artifacts", which explains how strided convolutions write such lattices into
    gradients; the index is our own.
    """
    height, width = energy.shape[-2:]
    found = [energy.new_zeros(len(energy))]
    for stride in strides:
        if stride < 2 or 4 * stride > min(height, width):
            continue
        for up, across in ((1, 0), (0, 1), (1, 1)):
            row, column = round(up * height / stride), round(across * width / stride)
            near, ring = _around(energy, row, column, 0, 1), _around(energy, row, column, 2, 4)
            found.append(torch.where(ring > NOTHING, near / ring.clamp(min=NOTHING), 0.0))
    return torch.stack(found).amax(0)


def _around(energy: Tensor, row: int, column: int, inner: int, outer: int) -> Tensor:
    """Mean of (B, H, W) over the frequencies `inner` to `outer` rows or columns away from one; the plane is a torus."""
    steps = itertools.product(range(-outer, outer + 1), repeat=2)
    rows, columns = zip(*((row + i, column + j) for i, j in steps if max(abs(i), abs(j)) >= inner), strict=True)
    height, width = energy.shape[-2:]
    return energy[:, [r % height for r in rows], [c % width for c in columns]].mean(1)


def total_variation(images: Tensor) -> Tensor:
    """Mean |difference| between a value and its neighbours below and to the right, (B, C, H, W) → (B,), 0 … 1.

    ½ mean |x[i+1, j] − x[i, j]| + ½ mean |x[i, j+1] − x[i, j]|, in units of full contrast. Source: Rudin, Osher &
    Fatemi 1992; Mahendran & Vedaldi 2015, with β = 1.
    """
    zero = images.new_zeros(len(images))
    down, right = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    parts = (part.mean(dim=(1, 2, 3)) if part.numel() else zero for part in (down, right))
    return torch.stack(list(parts)).mean(0)


def saturated(images: Tensor) -> Tensor:
    """Share of values within 2/255 of black or white, (B, C, H, W) → (B,), 0 … 1.

    A value there can't go on rising: what the unit asks for lies beyond what a picture can show.
    """
    return ((images <= NEAR + 1e-6) | (images >= 1 - NEAR - 1e-6)).to(images.dtype).mean(dim=(1, 2, 3))


def spectral_distance(images: Tensor, photographs: Spectrum) -> Tensor:
    """How far the amplitude spectrum is from that of `photographs`, (B, C, H, W) → (B,), in decades, from 0.

    With a(r) the log₁₀ of the mean |FFT| in ring r of frequencies (thirds of octaves from 1/32 to 1/2 cycles a pixel)
    and d = a_picture − a_photographs: √ mean (d − mean d)², so that contrast does not count, only how it is shared
    out. Of the most varying colour (lightness) in decorrelated logit space, as `Spectrum` has it; of pictures with
    other channels than the photographs, of their mean. 0 is the average photograph, single ones have 0.04 to 0.2,
    white noise 0.53. NaN where a picture is too small for two rings. Source: Field 1987, photographs' amplitudes fall
    as 1/f; Fel et al. 2023 (MACO) hold pictures to that spectrum.
    """
    height, width = images.shape[-2:]
    alike = images.shape[1] == len(photographs.colour)
    plain = torch.logit((images if alike else images.mean(1, keepdim=True)).clamp(EDGE, 1 - EDGE))
    if alike:
        lightness = torch.linalg.inv(torch.from_numpy(photographs.colour).double())[0].to(images)
        plain = torch.einsum("c,bchw->bhw", lightness, plain)[:, None]
    rings = _rings(height, width).to(images)
    if len(rings) < 2:
        return images.new_full((len(images),), torch.nan)
    ours = torch.fft.rfft2(_windowed(plain), norm="ortho").abs()[:, 0]
    apart = _levels(ours, rings) - _levels(photographs.at(height, width)[:1].to(images), rings)
    return (apart - apart.mean(1, keepdim=True)).square().mean(1).sqrt()


def _rings(height: int, width: int) -> Tensor:
    """(rings, H · (W // 2 + 1)): the mean over each ring of a real spectrum, without rings that no frequency is in."""
    at = _frequencies(height, width)[:, : width // 2 + 1].reshape(-1).double()
    edges = torch.logspace(-5, -1, RINGS + 1, 2.0, dtype=torch.float64)
    inside = torch.stack([(at >= low) & (at < high) for low, high in itertools.pairwise(edges.tolist())]).double()
    inside = inside[inside.any(1)]
    return inside / inside.sum(1, keepdim=True)


def _levels(amplitude: Tensor, rings: Tensor) -> Tensor:
    return (amplitude.flatten(1) @ rings.T).clamp(min=1e-8).log10()


def rank(responses: Tensor, channels: Tensor) -> Tensor:
    """Place of each picture's own channel among its layer's C channels by their answers to it, (B,), 1 … C.

    1 + how many channels answer the picture more strongly. `responses` are (B, C), in the units of the layer,
    `channels` (B,). 1: no other channel likes the picture better; those that answer alike share the better place.
    """
    own = responses.gather(1, channels[:, None])
    return (responses > own).sum(1).double() + 1


def agreement(responses: Tensor) -> Tensor:
    """Whether pictures of one unit from different starts are of one thing, (G, V, C) → (G, V), −1 … 1.

    Mean cosine between the layer's answer to a picture and those to the unit's other pictures, all without m, the mean
    answer to all G · V pictures, which they share whatever they show: mean_w cos(r_v − m, r_w − m). 1: the same
    answer; 0: no more alike than the pictures of any two units. NaN for V = 1, for a missing picture (NaN) and where
    there is one unit only, of which nothing could be told apart. Source: Olah, Mordvintsev & Schubert 2017,
    "Diversity", compare a unit's pictures by cosines in the layer; centred as in Kornblith et al. 2019 (CKA).
    """
    there = ~responses.isnan().any(2)
    nothing = responses.new_full(responses.shape[:2], torch.nan)
    if responses.shape[1] < 2 or int(there.any(1).sum()) < 2:
        return nothing
    unit = torch.nn.functional.normalize(responses - responses[there].mean(0), dim=2)
    cosine = unit @ unit.transpose(1, 2)
    count = responses.shape[1] - 1
    return (cosine.sum(2) - cosine.diagonal(dim1=1, dim2=2)) / count


def transfer(responses: Tensor, natural: Tensor, usual: Tensor) -> Tensor:
    """Whether a picture excites the layer as the unit's best photographs do, (G, V, C) → (G, V), −1 … 1.

    cos(r − u, n − u) with r the layer's answer to the picture, n (G, C) its mean answer to the unit's best photographs
    and u (C,) its mean answer to photographs of any kind. 1: the same; 0: no likeness; a picture that excites the
    unit by other means than photographs do is low here, whatever its activation. NaN where either is. Source:
    Geirhos et al. 2023, "Don't trust your eyes", who ask so whether pictures are processed as photographs are.
    """
    ours, theirs = responses - usual, (natural - usual)[:, None].expand_as(responses)
    found = torch.nn.functional.cosine_similarity(ours, theirs, dim=2)
    return torch.where((ours.isnan() | theirs.isnan()).any(2), torch.nan, found)


def kept(answers: Tensor) -> np.ndarray:
    """A layer's answers as they are kept, float16: three digits, and what is beyond ±65504 at that end."""
    most = torch.finfo(torch.float16).max
    return answers.clamp(-most, most).half().cpu().numpy()


def mean_answers(wanted: np.ndarray, index: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Mean answer of a layer to each unit's photographs, (G, C) float32; NaN for a unit without any.

    `wanted` (G, k) are photographs, −1 for none; `answers` (m, C) belong to the photographs `index` (m,).
    Photographs that are not in `index` are passed over.
    """
    order = np.argsort(index, kind="stable")
    at = np.searchsorted(index, wanted, sorter=order).clip(max=max(len(index) - 1, 0))
    rows = order[at] if len(index) else np.zeros(wanted.shape, int)
    there = (wanted >= 0) & ((index[rows] == wanted) if len(index) else False)
    found = np.full((len(wanted), answers.shape[1]), np.nan, np.float32)
    for i in np.flatnonzero(there.any(1)):
        found[i] = answers[rows[i][there[i]]].astype(np.float32).mean(0)
    return found
