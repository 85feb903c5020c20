"""Transparency masks: their scale, their size, and how they are shown."""

import numpy as np
import pytest
import torch

from pipeline.images.opacity import opacity, with_opacity
from pipeline.images.transparency import LEVELS, gradient_magnitude, resized_sums, to_mask


def test_a_magnitude_is_the_mean_over_colors_without_the_margin() -> None:
    gradient = torch.zeros(1, 3, 6, 8)
    gradient[0, :, 2, 3] = torch.tensor([3.0, -6.0, 0.0])
    gradient[0, :, 0, 0] = 100.0  # in the margin
    found = gradient_magnitude(gradient, (4, 6))
    assert found.shape == (1, 4, 6) and found[0, 1, 2] == 3 and found.sum() == 3


@pytest.mark.parametrize("size", [(24, 36), (8, 12), (17, 23)])
def test_sums_of_another_size_have_the_same_total_and_place(size: tuple[int, int]) -> None:
    sums = torch.zeros(2, 16, 24)
    sums[0, 4:8, 6:12], sums[1] = 2.0, 0.5
    resized = resized_sums(sums, size)
    assert resized.shape == (2, *size)
    assert torch.allclose(resized.sum((1, 2)), sums.sum((1, 2)), rtol=0.03)
    rows = torch.arange(size[0]) + 0.5
    assert float((resized[0].sum(1) * rows).sum() / resized[0].sum() / size[0]) == pytest.approx(6 / 16, abs=0.01)


def test_a_mask_is_linear_up_to_the_99th_percentile() -> None:
    sums = torch.linspace(0, 1, 10_000).view(1, 100, 100)
    sums[0, -1, -50:] = 1e6  # outliers do not change the scale
    mask = to_mask(sums)[0].flatten().float()
    assert mask.max() == 255 and len(mask.unique()) == LEVELS
    exact = (sums.flatten() / 0.99).clamp(max=1) * 255
    assert (mask - exact).abs().max() <= 255 / (LEVELS - 1) / 2 + 0.6
    assert torch.equal(to_mask(sums * 1e-12), to_mask(sums))  # images are scaled one by one


def test_a_mask_of_few_pixels_and_of_none() -> None:
    sums = torch.zeros(3, 20, 20)
    sums[1, 3, 4], sums[1, 5, 5] = 2.0, 1.0  # fewer pixels than one in a hundred
    sums[2, 0, 0] = torch.nan
    mask = to_mask(sums)
    assert not mask[0].any() and not mask[2].any()
    assert mask[1, 3, 4] == 255 and abs(int(mask[1, 5, 5]) - 127) <= 5 and int((mask[1] > 0).sum()) == 2


def test_a_fifth_of_the_pixels_is_opaque() -> None:
    mask = np.arange(100, dtype=np.uint8).reshape(10, 10)
    shown = opacity(mask)
    assert (shown == 255).mean() == pytest.approx(0.2, abs=0.01) and shown[0, 0] == 0
    assert shown[4, 0] == pytest.approx(255 * 40 / 79.2, abs=1)
    assert not opacity(np.zeros((4, 4), np.uint8)).any()
    assert opacity(np.full((4, 4), 255, np.uint8)).min() == 255
    few = np.zeros((10, 10), np.uint8)
    few[0, 0] = 99
    assert opacity(few)[0, 0] == 255 and opacity(few).sum() == 255


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_an_image_with_opacity_keeps_its_colors(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 7, channels), np.uint8)
    rgba = with_opacity(image, np.full((6, 7), 255, np.uint8))
    assert rgba.shape == (6, 7, 4) and (rgba[..., 3] == 255).all()
    assert np.array_equal(rgba[..., :3], image[..., :3] if channels > 1 else image.repeat(3, -1))
