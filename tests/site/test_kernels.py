"""Kernels as images: what is drawn is the kernel."""

import base64
import io

import numpy as np
from PIL import Image

from pipeline.site.media.kernel_images import kernel_views, layer_scale


def decoded(uri: str) -> np.ndarray:
    """Values −1 … 1 of a data URI, (3, h, w)."""
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return np.asarray(image, np.float64).transpose(2, 0, 1) / 127.5 - 1


def test_a_color_kernel_is_the_sum_of_its_parts_and_gray_is_zero() -> None:
    kernel = np.random.default_rng(0).normal(size=(3, 3, 5))
    kernel[:, 1, 1] = 0
    views = dict(kernel_views(kernel, 1e-6))
    assert list(views) == ["kernel", "lightness", "red − green", "yellow − blue"]
    whole, *parts = (decoded(uri) for uri in views.values())
    assert whole.shape == (3, 3, 5)
    assert np.allclose(whole * np.abs(kernel).max(), kernel, atol=0.02)
    assert np.allclose(sum(parts), whole, atol=0.02)
    assert (np.abs(whole[:, 1, 1]) < 0.005).all()


def test_an_edge_of_lightness_has_no_color() -> None:
    edge = np.tile(np.array([-2.0, 0.0, 2.0]), (3, 3, 1))
    whole, lightness, red, yellow = (decoded(uri) for _, uri in kernel_views(edge, 1e-6))
    assert np.allclose(whole, lightness, atol=0.005) and np.allclose(whole[0, 0], [-1, 0, 1], atol=0.01)
    assert (np.abs(red) < 0.005).all() and (np.abs(yellow) < 0.005).all()


def test_the_noise_of_a_channel_that_is_off_is_not_enlarged() -> None:
    kernels = np.stack([np.full((3, 2, 2), value) for value in (1.0, -2.0, 1e-7)])
    scale = layer_scale(kernels)
    assert (np.abs(decoded(kernel_views(kernels[2], scale)[0][1])) < 0.005).all()
    assert np.allclose(decoded(kernel_views(kernels[0], scale)[0][1]), 1, atol=0.01)


def test_bands_other_than_three_get_one_view_of_their_mean() -> None:
    ((title, uri),) = kernel_views(np.stack([np.ones((2, 2)), -np.ones((2, 2)), np.ones((2, 2)), np.ones((2, 2))]), 0.1)
    assert title == "kernel" and np.allclose(decoded(uri), 0.5, atol=0.01)
