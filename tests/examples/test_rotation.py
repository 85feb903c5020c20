"""The rotation number of layers whose channels are special by construction, and of rotations of them."""

import numpy as np
import pytest

from pipeline.examples.rotation import rotation_number


def sparse(images: int = 600, channels: int = 64) -> np.ndarray:
    """Channels that a few images each activate strongly, on different scales."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(images, channels)) + 8 * (rng.random((images, channels)) < 0.01)
    return values * np.logspace(-2, 2, channels) + 3


def test_channels_of_their_own_exceed_rotations_and_rotated_ones_do_not() -> None:
    special = sparse()
    rng = np.random.default_rng(1)
    standardized = (special - special.mean(0)) / special.std(0)
    mixed = standardized @ np.linalg.qr(rng.normal(size=(64, 64)))[0]
    assert rotation_number(special, seed=5) > 0.9
    assert rotation_number(mixed, seed=5) < 0.2
    noise = rng.normal(size=(600, 256))
    assert rotation_number(noise, seed=5) == pytest.approx(0.05, abs=0.04)


def test_it_depends_on_the_seed_alone_and_is_not_known_for_few_images() -> None:
    special = sparse()
    assert rotation_number(special, 3) == rotation_number(special.copy(), 3)
    constant = np.concatenate([special, np.full((600, 5), 7.0)], 1)
    assert rotation_number(constant, 3) == rotation_number(special, 3)  # constant channels are left out
    assert np.isnan(rotation_number(special[:50], 3)) and np.isnan(rotation_number(special[:, :1], 3))
