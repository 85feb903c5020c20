"""Measures of pictures on made pictures, where the answer is known."""

import dataclasses
import math

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.core import metric_specs
from pipeline.data import natural_spectrum
from pipeline.images import metrics
from pipeline.visualization.evaluation import Visualization


def waves(rows: float, columns: float, side: int = 128, contrast: float = 0.4) -> Tensor:
    """(1, 3, S, S): a grating of so many cycles a pixel down and across."""
    at = torch.arange(side, dtype=torch.float64)
    phase = 2 * torch.pi * (rows * at[:, None] + columns * at[None, :])
    return (0.5 + contrast * torch.cos(phase)).expand(1, 3, side, side)


def noise(side: int = 128, count: int = 1) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


PLAIN = torch.full((1, 3, 64, 64), 0.3, dtype=torch.float64)


@settings(deadline=None, max_examples=40)
@given(st.floats(0.02, 0.48), st.floats(0.02, 0.48), st.sampled_from([64, 97, 128]))
def test_a_grating_is_high_or_low_by_its_frequency(rows: float, columns: float, side: int) -> None:
    frequency = (rows**2 + columns**2) ** 0.5
    share = float(metrics.high_frequency(metrics.power(waves(rows, columns, side))))
    assert 0 <= share <= 1 + 1e-9
    if abs(frequency - 0.25) > 3 / side:
        assert share == pytest.approx(float(frequency > 0.25), abs=0.02)


def test_white_noise_has_the_share_of_its_area() -> None:
    # Frequencies up to 0.25 are a disc of π/16 of the unit square.
    assert float(metrics.high_frequency(metrics.power(noise()))) == pytest.approx(1 - torch.pi / 16, abs=0.02)
    assert float(metrics.high_frequency(metrics.power(PLAIN))) < 1e-12


def test_a_lattice_of_the_network_s_stride_stands_out() -> None:
    def index(images: Tensor, strides: tuple[int, ...]) -> float:
        return float(metrics.checkerboard(metrics.power(images), strides))

    strides = metrics.strides(8)
    assert strides == (2, 4, 8) and metrics.strides(14) == (2, 4, 8, 14) and metrics.strides(1) == ()
    plain = index(noise(), strides)
    assert 0.3 < plain < 3
    for stride in strides:
        lattice = waves(1 / stride, 0) * 0.1 + noise() * 0.5
        assert index(lattice, strides) > 5 * plain
        # A grating of another frequency is none of the network's making.
        other = waves(0.9 / stride + 0.07, 0) * 0.1 + noise() * 0.5
        assert index(other, (stride,)) < 3
    board = (torch.arange(128)[:, None] + torch.arange(128)[None, :]) % 2 * 0.2
    assert index(board.double().expand(1, 3, 128, 128) + noise() * 0.3, strides) > 20
    assert index(PLAIN, strides) == 0 and index(noise(16), (8,)) == 0 and index(noise(), ()) == 0


def test_total_variation_and_saturation_by_hand() -> None:
    stripes = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    stripes[..., ::2] = 1.0
    assert float(metrics.total_variation(stripes)) == 0.5 and float(metrics.total_variation(PLAIN)) == 0
    assert float(metrics.saturation(stripes)) == 1 and float(metrics.saturation(PLAIN)) == 0
    edges = torch.tensor([0, 12, 13, 242, 243, 255, 128, 127]).double().view(1, 1, 2, 4) / 255
    assert float(metrics.saturation(edges)) == 0.5


def photographs(count: int, power: float, seed: int = 0) -> list[np.ndarray]:
    """Pictures whose amplitudes fall as 1/f^power."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        spectrum = np.fft.rfft2(rng.normal(size=(3, 64, 64)))
        f = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.rfftfreq(64)[None])
        f[0, 0] = 1 / 64
        plain = np.fft.irfft2(spectrum / f**power, (64, 64))
        found.append((255 / (1 + np.exp(-plain / plain.std()))).round().astype(np.uint8))
    return found


def test_what_falls_as_photographs_do_is_natural_at_any_contrast() -> None:
    known = natural_spectrum.measure_spectrum(photographs(24, 1.0))

    def apart(power: float, contrast: float = 1.0) -> float:
        images = torch.from_numpy(np.stack(photographs(6, power, seed=1))).double() / 255
        return float(metrics.spectral_distance(0.5 + contrast * (images - 0.5), known).mean())

    assert apart(1.0) < 0.12 and apart(1.0, 0.3) < 0.14
    assert apart(0.0) > 3 * apart(1.0) and apart(2.0) > 3 * apart(1.0)


def test_the_peak_and_the_mean_are_of_the_own_channel() -> None:
    maps = torch.tensor([[[1.0, 5.0, 0.0], [9.0, 9.0, 9.0]], [[7.0, 7.0, 7.0], [-3.0, 2.0, 4.0]]])
    found = metrics.own_activations(maps, torch.tensor([0, 1]), negative=False)
    assert found["peak"].tolist() == [5, 4] and found["spatial_mean"].tolist() == [2, 1]
    assert metrics.own_activations(maps, torch.tensor([0, 1]), negative=True)["peak"].tolist() == [0, -3]


def test_the_margin_is_in_deviations_where_the_rank_was_of_raw_activations() -> None:
    """A channel of large values is first by rank on any image; here it is no further above its usual value."""
    natural = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([100.0, 1.0, 0.0]) + 5
    responses = torch.tensor([[[205.0, 9.0, 5.0]], [[205.0, 9.0, 5.0]], [[205.0, 9.0, 5.0]]])
    found = metrics.margin(responses, torch.tensor([0, 1, 2]), natural)[:, 0]
    assert responses[0, 0, 0] == responses.max()  # rank 1
    assert found[0] == pytest.approx(-2, abs=0.4) and found[1] == pytest.approx(2, abs=0.4) and found[2].isnan()
    assert bool(metrics.margin(responses, torch.tensor([0, 1, 2]), natural[:1]).isnan().all())
    lost = torch.full((1, 1, 3), torch.nan)
    assert bool(metrics.margin(lost, torch.tensor([1]), natural).isnan().all())


def test_contrast_and_chroma_of_known_images() -> None:
    half = torch.zeros(1, 3, 4, 4).double()
    half[..., 2:] = 1
    red = torch.tensor([1.0, 0.5, 0.5]).double()[:, None, None].expand(1, 3, 4, 4)
    assert metrics.appearance(half) == {
        "contrast": torch.tensor([0.5]).double(),
        "chroma": torch.tensor([0.0]).double(),
    }
    found = metrics.appearance(red)
    assert float(found["contrast"]) == pytest.approx(0, abs=1e-9) and float(found["chroma"]) == 0.5
    assert metrics.appearance(half[:, :1])["contrast"] == 0.5 and metrics.appearance(half[:, :1])["chroma"].isnan()


def test_quantiles_among_a_sample() -> None:
    sample = np.array([1.0, 2.0, 3.0, np.nan, 4.0])
    found = metrics.quantile_among(np.array([0.0, 2.0, 2.5, 9.0, np.nan]), sample)
    assert found[:4].tolist() == [0, 0.375, 0.5, 1] and np.isnan(found[4])
    assert np.isnan(metrics.quantile_among(np.ones(2), np.full(3, np.nan))).all()


def test_the_table_of_metrics_is_consistent() -> None:
    names = [metric.name for metric in metric_specs.METRICS]
    assert len(set(names)) == len(names) and set(metric_specs.MAIN_METRICS) <= set(names)
    for field in ("comparison_order", "grid_order"):
        orders = [order for m in metric_specs.METRICS if (order := getattr(m, field)) is not None]
        assert sorted(orders) == list(range(len(orders)))
    recorded = {field.name for field in dataclasses.fields(Visualization)}
    assert {metric.name for metric in metric_specs.RENDER_METRICS} <= recorded
    for metric in metric_specs.METRICS:
        assert metric.low < metric.high and (metric.source == "ratio") == bool(metric.numerator)
        assert not metric.numerator or metric.numerator in names
        assert not metric.numerator or metric.denominator in {
            *names,
            metric_specs.DATASET_MEAN,
            metric_specs.DATASET_PEAK,
        }
        # A missing visualization must be distinguishable, and its mark must fit the data type.
        assert not metric.low <= metric.missing <= metric.high or math.isinf(metric.low)
        assert np.array_equal(np.array(metric.missing, metric.dtype), metric.missing, equal_nan=True)
    # JavaScript reads numbers as doubles.
    assert [metric.name for metric in metric_specs.METRICS if metric.is_json_text] == ["seed"]


def test_photographs_are_near_their_own_spectrum_and_noise_is_far() -> None:
    pictures = np.stack([skimage.data.astronaut()[:256, :256], skimage.data.coffee()[:256, 100:356]])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).double() / 255
    known = natural_spectrum.packaged_spectrum()
    grey = images.mean(1, keepdim=True)
    assert metrics.spectral_distance(images, known).max() < 0.3 and metrics.spectral_distance(grey, known).max() < 0.3
    for channels in (1, 3, 4):
        far = metrics.spectral_distance(noise(count=2)[:, [0, 1, 2, 0][:channels]], known)
        assert far.shape == (2,) and far.min() > 0.4


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([1, 3, 5]), st.integers(1, 40), st.integers(1, 40))
def test_every_size_and_any_channels_give_numbers_in_range(channels: int, height: int, width: int) -> None:
    images = torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(height))
    found = metrics.image_metrics(images, (2, 4, 7), natural_spectrum.packaged_spectrum())
    assert found.keys() == {metric.name for metric in metric_specs.IMAGE_METRICS} - {"peak", "spatial_mean"}
    for name, values in found.items():
        metric = metric_specs.metric_named(name)
        if name == "spectral_distance" and bool(values.isnan().any()):
            assert min(height, width) < 4  # too small to have a spectrum
        elif name == "chroma" and channels != 3:
            assert bool(values.isnan().all())
        else:
            assert values.shape == (2,) and metric.low <= values.min() and values.max() <= metric.high + 1e-9


def test_a_picture_has_the_same_numbers_in_every_batch() -> None:
    images = ((noise(56, 7) * 255).round() / 255).float()
    together = metrics.image_metrics(images, (2, 4), natural_spectrum.packaged_spectrum())
    alone = metrics.image_metrics(images[3:4], (2, 4), natural_spectrum.packaged_spectrum())
    for name, values in together.items():
        assert values[3].float() == alone[name][0].float()


def test_ratios_are_of_peaks_of_means_and_of_copies_on_the_right_side_of_zero() -> None:
    values = {
        "peak": np.array([[6.0, 3.0], [1.0, 1.0]]),
        "spatial_mean": np.array([[5.0, 1.0], [1.0, 1.0]]),
        "activation": np.array([[5.0, 0.0], [1.0, -1.0]]),
        "robust": np.array([[4.0, 1.0], [1.0, 1.0]]),
    }
    best = {metric_specs.DATASET_PEAK: np.array([[3.0], [0.0]]), metric_specs.DATASET_MEAN: np.array([[1.0], [-1.0]])}
    found = metric_specs.ratios(values, best, negative=False)
    assert found.keys() == {metric.name for metric in metric_specs.RATIO_METRICS}
    # A texture that fills the map reaches five times the mean, and twice the peak, of a photograph.
    assert found["mean_ratio"][0].tolist() == [5, 1] and found["peak_ratio"][0].tolist() == [2, 1]
    assert found["robust_share"][0, 0] == np.float32(0.8) and np.isnan(found["robust_share"][:, 1]).all()
    assert np.isnan(found["peak_ratio"][1]).all() and np.isnan(found["mean_ratio"][1]).all()
    below = metric_specs.ratios(
        {"peak": np.array([[-4.0, 2.0]])}, {metric_specs.DATASET_PEAK: np.array([[-2.0]])}, True
    )
    assert below["peak_ratio"].tolist() == [[2, -1]] and list(below) == ["peak_ratio"]


def test_agreement_is_one_for_the_same_and_zero_for_any_two() -> None:
    a, b, c = torch.eye(3)
    shared = torch.tensor([5.0, 5.0, 5.0])  # what all pictures have in common says nothing
    found = metrics.agreement(torch.stack([torch.stack([x, x, x]) for x in (a, b, c)]) + shared)
    assert torch.allclose(found, torch.ones(3, 3))
    mixed = metrics.agreement(torch.stack([torch.stack([a, a, b]), torch.stack([c, c, c])]) + shared)
    assert torch.allclose(mixed[1], torch.ones(3)) and mixed[0, 2] < mixed[0, 0] < 1
    unlike = torch.randn(400, 2, 64, generator=torch.Generator().manual_seed(0))
    assert abs(float(metrics.agreement(unlike).mean())) < 0.03
    assert bool(metrics.agreement(unlike[:, :1]).isnan().all()) and bool(metrics.agreement(unlike[:1]).isnan().all())


def test_agreement_goes_on_where_pictures_are_missing() -> None:
    a, b = torch.eye(2)
    lost = torch.full((2, 2), torch.nan)
    found = metrics.agreement(torch.stack([torch.stack([a, a]), lost, torch.stack([b, b])]))
    assert torch.allclose(found[[0, 2]], torch.ones(2, 2)) and bool(found[1].isnan().all())


def layer_of_photographs(channels: int = 40, images: int = 300) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(3)
    scale = torch.logspace(-1, 1, channels)
    return torch.randn(images, channels, generator=generator) * scale + 4, generator


def test_transfer_leaves_the_own_channel_out() -> None:
    """An image and examples that share nothing but the channel that both were chosen by were similar before."""
    natural, generator = layer_of_photographs()
    mean, sd = natural.mean(0), natural.std(0)
    examples = mean + sd * torch.randn(200, 4, 40, generator=generator)
    pictures = mean + sd * torch.randn(200, 1, 40, generator=generator)
    examples[..., 7], pictures[..., 7] = mean[7] + 9 * sd[7], mean[7] + 30 * sd[7]
    channels = torch.full((200,), 7)
    found = metrics.transfer(pictures, channels, examples, natural)
    with_own = torch.cosine_similarity((pictures[:, 0] - mean) / sd, (examples.mean(1) - mean) / sd, dim=1)
    assert with_own.median() > 0.8
    assert abs(float(found.value.median())) < 0.05 and abs(float(found.ceiling.median())) < 0.1


def test_transfer_scales_channels_and_stands_between_floor_and_ceiling() -> None:
    natural, generator = layer_of_photographs()
    mean, sd = natural.mean(0), natural.std(0)
    feature = torch.randn(5, 40, generator=generator)
    examples = mean + sd * (3 * feature[:, None] + 0.5 * torch.randn(5, 4, 40, generator=generator))
    pictures = mean + sd * torch.stack([6 * feature, 0 * feature + torch.randn(5, 40, generator=generator)], 1)
    found = metrics.transfer(pictures, torch.arange(5), examples, natural)
    assert found.value[:, 0].min() > 0.95 and found.ceiling.min() > 0.9 and found.value[:, 1].abs().max() < 0.5
    assert bool((found.floor > 0.15).all()) and bool((found.floor < 0.45).all())
    # In raw activations the largest channels would decide alone.
    louder = natural * torch.logspace(0, 3, 40)
    again = metrics.transfer(
        pictures * torch.logspace(0, 3, 40), torch.arange(5), examples * torch.logspace(0, 3, 40), louder
    )
    assert torch.allclose(again.value, found.value, atol=1e-4) and torch.allclose(again.floor, found.floor, atol=1e-4)


def test_channels_that_training_left_nearly_constant_do_not_decide() -> None:
    """Their pre-activations vary by 1e-7 to 1e-4 over photographs, and by hundreds of that for an optimized image."""
    natural, generator = layer_of_photographs()
    dead = torch.tensor([3, 17])
    natural[:, dead] = 0.3 + 1e-4 * natural[:, dead]
    mean, sd = natural.mean(0), natural.std(0)
    examples = mean + sd * torch.randn(2, 4, 40, generator=generator)
    pictures = mean + sd * torch.randn(2, 1, 40, generator=generator)
    channels = torch.tensor([0, 1])
    pictures[0, 0, 0], pictures[1, 0, 1] = mean[0] + 9 * sd[0], mean[1] + 9 * sd[1]
    before = metrics.transfer(pictures, channels, examples, natural), metrics.margin(pictures, channels, natural)
    pictures[..., dead] += 500 * sd[dead]
    after = metrics.transfer(pictures, channels, examples, natural), metrics.margin(pictures, channels, natural)
    assert torch.allclose(before[0].value, after[0].value) and torch.allclose(before[1], after[1])
    assert bool((after[1] > 4).all()) and bool(metrics.margin(pictures, torch.tensor([3, 17]), natural).isnan().all())


def test_transfer_goes_on_where_examples_are_missing() -> None:
    natural, _ = layer_of_photographs()
    examples = natural[:8].reshape(2, 4, 40).clone()
    examples[0, 2:] = torch.nan
    examples[1] = torch.nan
    pictures = examples[:, :1].nan_to_num()
    found = metrics.transfer(pictures, torch.tensor([0, 1]), examples, natural)
    assert found.value[0, 0] > 0.5 and found.value[1].isnan().all()
    assert not found.ceiling[0].isnan() and found.ceiling[1].isnan()
    alone = metrics.transfer(pictures, torch.tensor([0, 1]), examples, natural[:1])
    assert bool(alone.value.isnan().all()) and bool(alone.floor.isnan().all())


def test_activations_are_found_by_image_and_missing_ones_are_passed_over() -> None:
    activations = np.array([[1, 10], [2, 20], [4, 40]], np.float16)
    wanted = np.array([[9, 3], [3, 77], [-1, -1], [5, -1], [77, -1]])
    found = metrics.example_activations(wanted, np.array([9, 3, 5]), activations)
    assert found[0].tolist() == [[1, 10], [2, 20]] and found[1, 0].tolist() == [2, 20] and found[3, 0, 1] == 40
    assert np.isnan(found[[2, 4]]).all() and np.isnan(found[[1, 3], 1]).all()
    assert np.isnan(metrics.example_activations(wanted, np.zeros(0, int), activations[:0])).all()
    assert metrics.to_float16(torch.tensor([1e9, -1e9, 2.0])).tolist() == [65504, -65504, 2]
