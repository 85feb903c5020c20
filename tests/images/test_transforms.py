"""Transforms: every draw is per image and per step, and the network always sees one size."""

import pytest
import torch

from pipeline.data.image_filters import blur
from pipeline.images.transforms import (
    TRANSFORMS,
    Blur,
    Crop,
    Flip,
    Jitter,
    Noise,
    Pad,
    Rotate,
    Scale,
    Zoom,
    apply_transforms,
    center_crop,
    draw_random,
)


def picture(size: int = 24) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_no_transform_is_the_middle() -> None:
    images = picture()
    assert torch.equal(apply_transforms(images, (), torch.zeros(2, 0), (16, 16)), images[..., 4:20, 4:20])
    assert torch.equal(center_crop(images, (24, 24)), images)


def test_half_of_all_draws_changes_nothing() -> None:
    transforms = (Jitter(4), Scale(0.5, 1.5), Rotate(30), Jitter(2))
    images = picture()
    assert torch.allclose(apply_transforms(images, transforms, torch.full((2, 6), 0.5), (24, 24)), images, atol=1e-5)


def test_jitter_moves_by_whole_pixels_each_image_its_own() -> None:
    images = picture()
    u = torch.tensor([[0.999, 0.5], [0.5, 0.0]])  # +3 rightwards; -3 upwards
    shaken = apply_transforms(images, (Jitter(3),), u, (16, 16))
    assert torch.allclose(shaken[0], images[0, :, 4:20, 7:23], atol=1e-5)
    assert torch.allclose(shaken[1], images[1, :, 1:17, 4:20], atol=1e-5)


def test_jitter_draws_every_shift_alike() -> None:
    u = torch.rand(20000, 2, generator=torch.Generator().manual_seed(1))
    shifts, counts = Jitter(2).matrix(u, (9, 9), (9, 9))[:, 0, 2].unique(return_counts=True)
    assert shifts.tolist() == [-2, -1, 0, 1, 2]
    assert (counts / 20000 - 0.2).abs().max() < 0.015


def test_a_quarter_turn_is_rot90() -> None:
    images = picture()
    turned = apply_transforms(images, (Rotate(90),), torch.ones(2, 1), (24, 24))
    matches = [torch.allclose(turned, images.rot90(k, (2, 3)), atol=1e-4) for k in (1, 3)]
    assert sum(matches) == 1


def test_scale_enlarges_about_the_centre() -> None:
    ramp = torch.linspace(0, 1, 25).repeat(1, 1, 25, 1)
    scaled = apply_transforms(ramp, (Scale(1.0, 2.0),), torch.ones(1, 1), (25, 25))
    assert scaled[0, 0, 12, 12].item() == pytest.approx(0.5, abs=1e-5)
    slope = (scaled[0, 0, 12, 16] - scaled[0, 0, 12, 12]).item()
    assert slope == pytest.approx(4 / 24 / 2, abs=1e-5)


def test_transforms_work_in_their_order() -> None:
    """Shift, then enlarge: the shift is enlarged too. The other way round it is not."""
    spot = torch.zeros(1, 1, 41, 41)
    spot[0, 0, 20, 18] = 1
    right = torch.tensor([[0.5, 0.5, 0.5]])
    right[0, 0] = 0.999

    def column(transforms: tuple, u: torch.Tensor) -> int:
        return int(apply_transforms(spot, transforms, u, (41, 41))[0, 0, 20].argmax())

    # Jitter by +4 looks 4 pixels to the right, so the spot moves 4 to the left: from 2 to 6 left of the centre.
    assert column((Jitter(4), Scale(2.0, 2.0)), torch.tensor([[0.999, 0.5, 0.5]])) == 20 - 12
    assert column((Scale(2.0, 2.0), Jitter(4)), torch.tensor([[0.5, 0.999, 0.5]])) == 20 - 8


def test_draws_are_each_pictures_own() -> None:
    transforms = (Jitter(4), Rotate(5))
    one, again = (draw_random(transforms, torch.Generator().manual_seed(7), 6) for _ in range(2))
    assert one.shape == (6, 3) and torch.equal(one, again)
    assert one.min() >= 0 and one.max() < 1


def test_one_of_the_values_is_chosen_as_often_as_any_other() -> None:
    u = torch.rand(30000, 1, generator=torch.Generator().manual_seed(1))
    angles = Rotate(values=(-10, 0, 0, 5)).matrix(u, (9, 9), (9, 9))
    turned = torch.rad2deg(torch.atan2(angles[:, 1, 0], angles[:, 0, 0])).round()
    shares = {float(v): float((turned == v).float().mean()) for v in turned.unique()}
    assert shares == pytest.approx({-10.0: 0.25, 0.0: 0.5, 5.0: 0.25}, abs=0.01)


def test_flip_mirrors_left_and_right() -> None:
    images = picture()
    shaken = apply_transforms(images, (Flip(0.5),), torch.tensor([[0.2], [0.8]]), (24, 24))
    assert torch.allclose(shaken[0], images[0].flip(2), atol=1e-5) and torch.allclose(shaken[1], images[1], atol=1e-5)


def test_a_crop_lies_within_the_canvas_at_pixel_scale() -> None:
    images = picture(40)
    for draw_of in (torch.rand(2, 2), torch.tensor([[0.0, 0.999999], [0.5, 0.5]])):
        shaken = apply_transforms(images, (Crop(0.3),), draw_of, (24, 24))
        windows = images.unfold(2, 24, 1).unfold(3, 24, 1)
        distance = (windows - shaken[:, :, None, None]).abs().amax(dim=(1, 4, 5))
        assert (distance.flatten(1).min(dim=1).values < 1e-4).all()


def test_zoom_enlarges_a_part_and_never_looks_beyond() -> None:
    images = torch.zeros(64, 1, 40, 40)
    images[..., 4:36, 4:36] = 1  # what is reflected at the border would be 0 beside 0
    u = torch.rand(64, 3, generator=torch.Generator().manual_seed(0))
    shaken = apply_transforms(images, (Zoom(0.5, 0.5, spread=5.0),), u, (24, 24))
    assert shaken.shape == (64, 1, 24, 24)
    # The parts lie in the corners: 4 of 20 pixels are dark on two sides, 5 of 24 after enlarging.
    assert shaken.mean().item() == pytest.approx((1 - 4 / 20) ** 2, abs=0.02)


def test_pad_frames_with_grey_and_keeps_the_view() -> None:
    images = torch.ones(1, 3, 16, 16)
    shaken = apply_transforms(images, (Pad(4, 0.5), Jitter(3)), torch.tensor([[0.999, 0.5]]), (16, 16))
    assert shaken.shape == images.shape
    assert torch.allclose(shaken[..., 13:], torch.full((1, 3, 16, 3), 0.5)) and (shaken[..., :13] == 1).all()


def test_noise_is_each_images_own_and_normal() -> None:
    transform = Noise(0.1)
    images, u = torch.zeros(3, 3, 64, 64), torch.rand(3, 2)
    noisy = transform.apply(images, u)
    assert noisy.std().item() == pytest.approx(0.1, rel=0.02) and abs(noisy.mean().item()) < 2e-3
    assert torch.equal(transform.apply(images[1:2], u[1:2])[0], noisy[1])
    correlation = torch.corrcoef(noisy.flatten(1))
    assert (correlation - torch.eye(3)).abs().max() < 0.04
    # Fourth moment of a normal distribution is 3; neighbours are independent.
    flat = noisy.flatten() / noisy.std()
    assert flat.pow(4).mean().item() == pytest.approx(3, abs=0.15)
    assert abs((flat[1:] * flat[:-1]).mean().item()) < 0.02


def test_blur_is_each_images_own() -> None:
    images, u = picture(), torch.tensor([[0.0], [1.0]])
    shaken = apply_transforms(images, (Blur(0.0, 2.0),), u, (24, 24))
    assert torch.allclose(shaken[0], images[0], atol=1e-6)
    assert torch.allclose(shaken[1], blur(images[1:], 2.0)[0], atol=1e-5)


def test_effects_between_moves_keep_the_canvas() -> None:
    """A move after a blur still finds the margin, so that nothing is reflected that need not be."""
    images = torch.arange(32.0).repeat(1, 1, 32, 1) / 32
    shaken = apply_transforms(images, (Blur(0.0, 0.0), Jitter(4)), torch.tensor([[0.5, 0.999, 0.5]]), (16, 16))
    assert torch.allclose(shaken, images[..., 8:24, 12:28], atol=1e-5)


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_every_transform_lets_gradients_through(name: str) -> None:
    transform = TRANSFORMS[name]()
    images = picture().double().requires_grad_(True)
    u = torch.rand(2, transform.num_random, generator=torch.Generator().manual_seed(0)).double()
    shaken = apply_transforms(images, (transform,), u, (16, 16))
    (gradient,) = torch.autograd.grad(shaken.sum(), images)
    assert shaken.shape == (2, 3, 16, 16) and gradient.abs().sum() > 0 and torch.isfinite(gradient).all()
