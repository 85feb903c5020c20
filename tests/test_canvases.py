"""Canvases and transforms: constants of the field, and one picture at a time whatever the batch."""

import math

import pytest
import torch

from pipeline.canvases import CANVASES, Fourier, Pixel, frequencies
from pipeline.transforms import Jitter, Rotate, Scale, centre, draw, shake


@pytest.mark.parametrize("size", [128, 224])
def test_first_image_is_as_quiet_as_lucids(size: int) -> None:
    """lucid and lucent start at a standard deviation of 0.018 (128 px) to 0.020 (224 px) before colour."""
    canvas = Fourier(decorrelated=False)
    start = torch.stack([canvas.start(torch.Generator().manual_seed(i), 3, size) for i in range(4)])
    before_sigmoid = torch.logit(canvas.image(start, size))
    assert 0.016 < before_sigmoid.std().item() < 0.022


@pytest.mark.parametrize("name", list(CANVASES))
@pytest.mark.parametrize(("channels", "size"), [(1, 17), (3, 32), (4, 32)])
def test_every_canvas_gives_images_in_range(name: str, channels: int, size: int) -> None:
    canvas = CANVASES[name]()
    start = canvas.start(torch.Generator().manual_seed(0), channels, size) * 100
    image = canvas.image(start[None], size)
    assert image.shape == (1, channels, size, size)
    assert image.min() >= 0 and image.max() <= 1 and image.std() > 0


@pytest.mark.parametrize("name", list(CANVASES))
def test_a_picture_does_not_know_its_batch(name: str) -> None:
    canvas = CANVASES[name]()
    start = torch.stack([canvas.start(torch.Generator().manual_seed(i), 3, 24) for i in range(5)])
    assert torch.allclose(canvas.image(start, 24)[3], canvas.image(start[3:4], 24)[0], atol=1e-6)


def test_frequencies_are_cycles_per_pixel() -> None:
    f = frequencies(8)
    assert f.shape == (8, 5) and f[0, 0] == 0 and f[0, 4] == 0.5 and f[4, 0] == 0.5
    assert f[1, 1].item() == pytest.approx(math.sqrt(2) / 8)


def test_equal_coefficients_give_low_frequencies_their_share() -> None:
    """1/f: a coefficient at half the frequency moves the image twice as far."""
    canvas, size = Fourier(decorrelated=False), 32
    swings = []
    for column in (2, 4):
        parameters = torch.zeros(1, 1, size, size // 2 + 1, 2)
        parameters[0, 0, 0, column, 0] = 0.01
        swings.append((canvas.image(parameters, size) - 0.5).abs().max().item())
    assert swings[0] / swings[1] == pytest.approx(2, rel=1e-3)


def test_grey_is_the_middle_of_every_canvas() -> None:
    assert torch.equal(Pixel().image(torch.zeros(1, 3, 4, 4), 4), torch.full((1, 3, 4, 4), 0.5))


def picture(size: int = 24) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_no_transform_is_the_middle() -> None:
    images = picture()
    assert torch.equal(shake(images, (), torch.zeros(2, 0), 16), images[..., 4:20, 4:20])
    assert torch.equal(centre(images, 24), images)


def test_half_of_all_draws_changes_nothing() -> None:
    transforms = (Jitter(4), Scale(0.5, 1.5), Rotate(30), Jitter(2))
    images = picture()
    assert torch.allclose(shake(images, transforms, torch.full((2, 6), 0.5), 24), images, atol=1e-5)


def test_jitter_moves_by_whole_pixels_each_image_its_own() -> None:
    images = picture()
    u = torch.tensor([[0.999, 0.5], [0.5, 0.0]])  # +3 rightwards; -3 upwards
    shaken = shake(images, (Jitter(3),), u, 16)
    assert torch.allclose(shaken[0], images[0, :, 4:20, 7:23], atol=1e-5)
    assert torch.allclose(shaken[1], images[1, :, 1:17, 4:20], atol=1e-5)


def test_jitter_draws_every_shift_alike() -> None:
    u = torch.rand(20000, 2, generator=torch.Generator().manual_seed(1))
    shifts, counts = Jitter(2).matrix(u)[:, 0, 2].unique(return_counts=True)
    assert shifts.tolist() == [-2, -1, 0, 1, 2]
    assert (counts / 20000 - 0.2).abs().max() < 0.015


def test_a_quarter_turn_is_rot90() -> None:
    images = picture()
    turned = shake(images, (Rotate(90),), torch.ones(2, 1), 24)
    matches = [torch.allclose(turned, images.rot90(k, (2, 3)), atol=1e-4) for k in (1, 3)]
    assert sum(matches) == 1


def test_scale_enlarges_about_the_centre() -> None:
    ramp = torch.linspace(0, 1, 25).repeat(1, 1, 25, 1)
    scaled = shake(ramp, (Scale(1.0, 2.0),), torch.ones(1, 1), 25)
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
        return int(shake(spot, transforms, u, 41)[0, 0, 20].argmax())

    # Jitter by +4 looks 4 pixels to the right, so the spot moves 4 to the left: from 2 to 6 left of the centre.
    assert column((Jitter(4), Scale(2.0, 2.0)), torch.tensor([[0.999, 0.5, 0.5]])) == 20 - 12
    assert column((Scale(2.0, 2.0), Jitter(4)), torch.tensor([[0.5, 0.999, 0.5]])) == 20 - 8


def test_draws_are_each_pictures_own() -> None:
    transforms = (Jitter(4), Rotate(5))
    one, again = (draw(transforms, torch.Generator().manual_seed(7), 6) for _ in range(2))
    assert one.shape == (6, 3) and torch.equal(one, again)
    assert one.min() >= 0 and one.max() < 1
