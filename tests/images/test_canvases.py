"""Canvases: constants of the field, and one picture at a time whatever the batch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.core.config_files import ConfigFile, load_config_files
from pipeline.core.errors import AtlasError
from pipeline.core.registry import canonical
from pipeline.data.image_filters import blur, frequencies
from pipeline.data.natural_spectrum import Spectrum, measure_spectrum, packaged_spectrum
from pipeline.images.parameterizations import (
    CANVASES,
    COLOR_MATRIX,
    Fourier,
    FromImage,
    Maco,
    Parameterization,
    Pixel,
    frame,
)


@pytest.mark.parametrize("size", [128, 224])
def test_first_image_is_as_quiet_as_lucids(size: int) -> None:
    """lucid and lucent start at a standard deviation of 0.018 (128 px) to 0.020 (224 px) before colour."""
    canvas = Fourier(colour="plain", decay=1.0)
    start = torch.stack([canvas.initial(torch.Generator().manual_seed(i), 3, (size, size)) for i in range(4)])
    before_sigmoid = torch.logit(canvas.image(start, (size, size)))
    assert 0.016 < before_sigmoid.std().item() < 0.022


def every_canvas() -> list[Parameterization]:
    return [load_config_files(CANVASES[name](), "canvas") for name in CANVASES]


CASES = pytest.mark.parametrize("canvas", every_canvas(), ids=list(CANVASES))


def photograph(size: tuple[int, int] = (32, 32), channels: int = 3) -> torch.Tensor:
    """Something natural enough: smooth, with black, white and noise in it."""
    torch.manual_seed(0)
    return blur(torch.rand(2, channels, *size) * 4 - 1.5, 2.0).clamp(0, 1)


@CASES
@pytest.mark.parametrize(("channels", "size"), [(1, (17, 17)), (3, (32, 32)), (4, (32, 32)), (3, (24, 41))])
def test_every_canvas_gives_images_in_range(canvas: Parameterization, channels: int, size: tuple[int, int]) -> None:
    if isinstance(canvas, Maco) and channels != 3:
        with pytest.raises(AtlasError, match=f"has 3 channels, the network takes {channels}"):
            canvas.check(channels)
        return
    start = canvas.initial(torch.Generator().manual_seed(0), channels, size)
    image = canvas.image(start[None] * 100 + 1, size)
    assert image.shape == (1, channels, *size)
    assert image.min() >= 0 and image.max() <= 1 and image.std() > 0


@CASES
def test_a_picture_does_not_know_its_batch(canvas: Parameterization) -> None:
    size = (24, 24)
    start = torch.stack([canvas.initial(torch.Generator().manual_seed(i), 3, size) for i in range(5)])
    assert torch.allclose(canvas.image(start, size)[3], canvas.image(start[3:4], size)[0], atol=1e-6)


@CASES
@pytest.mark.parametrize("size", [(32, 32), (33, 40)])
def test_a_photograph_in_is_the_same_photograph_out(canvas: Parameterization, size: tuple[int, int]) -> None:
    """Within one step of 8 bits; maco keeps the phases and gives up the amplitudes: that is its point."""
    images = photograph(size)
    back = canvas.image(canvas.inverse(images), size)
    if isinstance(canvas, Maco):
        phases = [torch.fft.rfft2(canvas.from_rgb(x)).angle()[..., 1:6, 1:6] for x in (images, back)]
        assert torch.cos(phases[0] - phases[1]).mean() > 0.99
    else:
        assert ((back * 255).round() - (images * 255).round()).abs().max() <= 1


@CASES
def test_blurring_parameters_blurs_the_picture(canvas: Parameterization) -> None:
    if not canvas.can_blur:
        return
    size = (32, 32)
    images = photograph(size) * 0.2 + 0.4  # where the sigmoid is nearly linear
    blurred = canvas.image(canvas.blurred(canvas.inverse(images), 1.5, size), size)
    inner = (..., slice(8, 24), slice(8, 24))  # edges are reflected by some, wrapped by others
    tolerance = 0.02 if canvas.__class__.__name__ == "Laplacian" else 0.004
    assert (blurred - blur(images, 1.5))[inner].abs().max() < tolerance


@CASES
def test_a_canvas_grows_and_keeps_its_picture(canvas: Parameterization) -> None:
    if not canvas.can_grow:
        return
    old, new = (32, 32), (48, 64)
    images = blur(photograph(old), 2.0)
    grown = canvas.image(canvas.resized(canvas.inverse(images), old, new), new)
    again = torch.nn.functional.interpolate(grown, old, mode="area")
    inner = (..., slice(6, 26), slice(6, 26))
    # Half a pixel of offset is between the ways of growing, and the Fourier one wraps around.
    assert grown.shape[-2:] == new and (again - images)[inner].abs().max() < 0.06


def test_growing_a_fourier_canvas_pads_its_spectrum_with_zeros() -> None:
    canvas = Fourier(colour="plain", decay=1.0)
    grown = canvas.resized(torch.randn(1, 1, 16, 9, 2), (16, 16), (32, 32))
    spectrum = torch.view_as_complex(grown)[0, 0]
    assert spectrum[:8, :8].abs().min() > 0
    assert torch.equal(spectrum[8:25], torch.zeros(17, 17)) and torch.equal(spectrum[:, 8:], torch.zeros(32, 9))


def test_clipped_pixels_are_brought_back() -> None:
    canvas = Pixel(clip=True, mean=0.784, sd=0.031)
    parameters = canvas.initial(torch.Generator().manual_seed(0), 3, (64, 64))[None]
    assert parameters.mean().item() == pytest.approx(0.784, abs=0.002)
    parameters += torch.linspace(-1, 1, 64)
    canvas.project(parameters)
    assert parameters.min() == 0 and parameters.max() == 1


def test_maco_has_the_amplitudes_of_photographs() -> None:
    # Quiet enough that nothing saturates.
    canvas = load_config_files(Maco(contrast=0.3, standardize=False), "canvas")
    size = (64, 64)
    image = canvas.image(torch.randn(1, 3, 64, 33), size)
    amplitude = torch.fft.rfft2(canvas.from_rgb(image), norm="ortho").abs()[0, :, 1:31, 1:31]
    wanted = 0.3 * canvas.measured.at(*size)[:, 1:31, 1:31]
    assert (amplitude / wanted - 1).abs().median() < 0.02


def test_maco_standardizes_each_image_and_keeps_the_shape_of_the_spectrum() -> None:
    """As Horama: mean 0 and one deviation over all channels of an image, whatever the phases; not so without."""
    size = (64, 64)
    torch.manual_seed(0)
    phases = torch.randn(3, 3, 64, 33) * torch.tensor([0.01, 1.0, 3.0])[:, None, None, None]
    canvas = load_config_files(Maco(contrast=0.4), "canvas")
    decorrelated = canvas.from_rgb(canvas.image(phases, size))
    assert decorrelated.mean(dim=(1, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=0.01)
    deviations = decorrelated[1:].std(dim=(1, 2, 3)).tolist()  # the first is one bright point, which saturates
    assert deviations == pytest.approx([0.4, 0.4], rel=0.02)
    amplitude = torch.fft.rfft2(decorrelated, norm="ortho").abs()[1:, :, 1:31, 1:31]
    ratio = amplitude / canvas.measured.at(*size)[:, 1:31, 1:31]
    assert (ratio / ratio.flatten(1).median(dim=1).values[:, None, None, None] - 1).abs().median() < 0.02
    plain = load_config_files(Maco(contrast=0.4, standardize=False), "canvas")
    assert plain.from_rgb(plain.image(phases, size))[1:].std(dim=(1, 2, 3)).max() < 0.37  # paler than asked for


def test_maco_gradients_are_those_of_finite_differences() -> None:
    canvas = load_config_files(Maco(), "canvas")
    phases = torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: canvas.image(p, (6, 6)), (phases,), atol=1e-6)


def test_measured_colours_are_decorrelated() -> None:
    """The covariance of pixels, seen through the inverse of the measured matrix, is a multiple of the identity."""
    torch.manual_seed(0)
    mixed = torch.einsum("rc,bchw->brhw", torch.tensor([[1, 0.6, 0], [1, 0, 0.3], [1, -0.5, 0.0]]),
                         torch.randn(6, 3, 16, 16)) * 20 + 128  # fmt: skip
    spectrum = measure_spectrum([image.clamp(0, 255).to(torch.uint8).numpy() for image in mixed])
    pixels = mixed.clamp(0, 255).permute(1, 0, 2, 3).flatten(1)
    plain = torch.linalg.inv(torch.from_numpy(spectrum.colour)) @ pixels
    covariance = torch.cov(plain)
    assert (covariance / covariance[0, 0] - torch.eye(3)).abs().max() < 0.02
    # As lucid's: with rows in its place, starts and steps would be 1.5 times as large as with `decorrelated`.
    for matrix in (spectrum.colour, packaged_spectrum().colour, np.array(COLOR_MATRIX)):
        assert np.linalg.norm(matrix, axis=0).max() == pytest.approx(1, abs=1e-4)


def test_a_spectrum_survives_its_file(tmp_path: Path) -> None:
    spectrum = measure_spectrum([(photograph()[i].numpy() * 255).astype(np.uint8) for i in range(2)])
    path = tmp_path / "mine.npz"
    path.write_bytes(spectrum.content())
    again = Spectrum.of(ConfigFile(str(path)).read("there"))
    assert np.allclose(again.amplitude, spectrum.amplitude, rtol=2e-3, atol=1e-6) and np.allclose(
        again.colour, spectrum.colour, rtol=1e-6
    )
    # A file of an earlier version, whose colors were divided by the largest row norm, gives the same.
    rows = Spectrum(spectrum.amplitude / 1.5, spectrum.colour * 1.5, spectrum.mean / 1.5)
    path.write_bytes(rows.content())
    older = Spectrum.of(ConfigFile(str(path)).read("there"))
    for name in ("amplitude", "colour", "mean"):
        assert np.allclose(getattr(older, name), getattr(again, name), rtol=2e-3, atol=1e-6)
    (tmp_path / "else.npz").write_bytes(b"no array at all")
    with pytest.raises(AtlasError, match=r"is not an \.npy or \.npz"):
        Spectrum.of(ConfigFile(str(tmp_path / "else.npz")).read("there"))
    with pytest.raises(AtlasError, match="can't be read: No such file"):
        load_config_files(Maco(spectrum=ConfigFile("nowhere.npz")), "render.canvas")


def test_the_start_is_cut_around_what_excited_the_unit() -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[10, 50] = 255
    cut = frame(image, (16, 16), (10 / 40, 50 / 60))
    assert cut.shape == (3, 16, 16) and int(cut[0].argmax()) == 8 * 16 + 8
    assert frame(image, (80, 80)).shape == (3, 80, 80)
    assert FromImage().uses_file("source") is False and FromImage(source=ConfigFile("cat.png")).uses_file("source")


def test_frequencies_are_cycles_per_pixel() -> None:
    f = frequencies(8, 8)
    assert f.shape == (8, 5) and f[0, 0] == 0 and f[0, 4] == 0.5 and f[4, 0] == 0.5
    assert f[1, 1].item() == pytest.approx(math.sqrt(2) / 8)


def test_equal_coefficients_give_low_frequencies_their_share() -> None:
    """1/f: a coefficient at half the frequency moves the image twice as far."""
    canvas, size = Fourier(colour="plain", decay=1.0), 32
    swings = []
    for column in (2, 4):
        parameters = torch.zeros(1, 1, size, size // 2 + 1, 2)
        parameters[0, 0, 0, column, 0] = 0.01
        swings.append((canvas.image(parameters, (size, size)) - 0.5).abs().max().item())
    assert swings[0] / swings[1] == pytest.approx(2, rel=1e-3)


def test_grey_is_the_middle_of_every_canvas() -> None:
    assert torch.equal(Pixel().image(torch.zeros(1, 3, 4, 4), (4, 4)), torch.full((1, 3, 4, 4), 0.5))


@pytest.mark.parametrize("noise", ["pixels", "uniform", "phases"])
def test_the_noise_of_a_fourier_canvas_has_the_deviation_that_was_asked_for(noise: str) -> None:
    canvas = load_config_files(Fourier(noise=noise, sd=0.4), "canvas")
    parameters = canvas.initial(torch.Generator().manual_seed(1), 3, (64, 48))
    assert parameters.shape == Fourier().initial(torch.Generator().manual_seed(1), 3, (64, 48)).shape
    decorrelated = canvas.from_rgb(canvas.image(parameters[None], (64, 48)))[0]
    assert decorrelated.std().item() == pytest.approx(0.4, rel=0.1)
    power = torch.fft.rfft2(decorrelated - decorrelated.mean((1, 2), keepdim=True)).abs().pow(2)
    f = frequencies(64, 48)
    share = (power[:, f > 0.25].sum() / power.sum()).item()
    # White noise has most of its energy above a quarter cycle per pixel, natural images next to none.
    assert share < 0.1 if noise == "phases" else share > 0.6
    if noise == "uniform":
        assert decorrelated.abs().max().item() < 0.4 * 3**0.5 * 1.01


def test_a_fourier_canvas_without_other_noise_keeps_its_digest() -> None:
    assert "noise" not in canonical(Fourier())
    assert canonical(Fourier(noise="pixels"))["noise"] == "pixels"
