"""Objectives, penalties, couplings and preconditioners: gradients against finite differences, and what they mean."""

import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinyNet, compose
from torch import Tensor, nn

from pipeline.core.config_files import ConfigFile, load_config_files
from pipeline.core.errors import AtlasError
from pipeline.data.image_filters import rms
from pipeline.images import image_regularizers
from pipeline.images.gradient_preconditioners import BlurGradient, Normalise, ScaleSpectrum, Sign
from pipeline.images.image_regularizers import L2, PENALTIES, HighFrequency, ImageRegularizer, TotalVariation
from pipeline.visualization.batch_terms import COUPLINGS, Alignment, Diversity, gram_cosine
from pipeline.visualization.objectives import (
    OBJECTIVES,
    Activations,
    Direction,
    Facet,
    Interpolate,
    Joint,
    LayerInfo,
    Objective,
    SquashedLogit,
)
from pipeline.visualization.schedules import (
    STOPS,  # noqa: F401  (registries fill on import)
    StepSettings,
)
from pipeline.visualization.step import regularizer_gradients


def facet_targets(channels: int, variants: int = 2) -> ConfigFile:
    """Targets of the objective `facet` for a layer of so many channels."""
    rng, buffer = np.random.default_rng(1), io.BytesIO()
    center, mean = rng.standard_normal((variants, channels)), rng.standard_normal(channels)
    np.savez(buffer, center=center, mean=mean, deviation=np.abs(mean) + 0.5)
    return ConfigFile("facets.npz", buffer.getvalue())


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> ConfigFile:
    path = tmp_path_factory.mktemp("vectors") / "directions.npy"
    np.save(path, np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32))
    return ConfigFile(str(path)).read("vectors")


def built(name: str, vectors: ConfigFile) -> Objective:
    settings = {
        "direction": {"vectors": vectors, "power": 2.0},
        "joint": {"with_units": ("deep:1", "deep:2"), "weights": (0.5, -2.0)},
        "directions": {"vectors": vectors, "power": 1.0},
        "caricature": {"power": 1.0},
        "interpolate": {"to": "deep:3"},
        "facet": {"targets": facet_targets(8, 3), "embedding": "deep", "power": 2.0},
    }
    return OBJECTIVES[name](**settings.get(name, {}))


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_objectives_against_finite_differences_through_a_network(name: str, vectors: ConfigFile) -> None:
    """In float64, from the image through two layers of a real (small) network."""
    torch.manual_seed(0)
    net = TinyNet().double().eval()
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    objective = built(name, vectors)
    images = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True)

    def value(images: Tensor) -> Tensor:
        own = net.norm(net.stem(images))
        deep = net.late(torch.tanh(own))
        numbers = torch.tensor([2, 0]), torch.tensor([0, 2])
        target = torch.linspace(-1, 2, own.shape[1], dtype=torch.float64)[None, :, None, None]
        return objective.value(Activations(own, *numbers, 3, {"deep": deep}, target))

    assert value(images).shape == (2,)
    assert torch.autograd.gradcheck(value, (images,), atol=1e-6)


def penalty_of(name: str) -> ImageRegularizer:
    return PENALTIES[name](softness=0.1) if name == "tv" else PENALTIES[name]()


@pytest.mark.parametrize("name", list(PENALTIES))
def test_penalties_against_finite_differences(name: str) -> None:
    torch.manual_seed(1)
    images = torch.rand(2, 3, 8, 9, dtype=torch.float64, requires_grad=True)
    first = torch.rand(2, 3, 8, 9, dtype=torch.float64)
    penalty = penalty_of(name)
    assert (penalty.value(images, first) >= 0).all()
    assert torch.autograd.gradcheck(lambda x: penalty.value(x, first), (images,), atol=1e-6)


@pytest.mark.parametrize("name", list(COUPLINGS))
def test_couplings_against_finite_differences(name: str) -> None:
    torch.manual_seed(2)
    groups = torch.randn(2, 3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(COUPLINGS[name]().value, (groups,), atol=1e-6)


def test_a_budget_scales_the_gradient_of_each_image_by_its_own_multiplier() -> None:
    """The gradient that the loop subtracts, against finite differences of λ · value, image by image."""
    preset = dataclasses.replace(compose(["render=tv"]).config.render, penalties=(L2(budget=0.05), TotalVariation(0.3)))
    images = torch.rand(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    multipliers = torch.tensor([[0.2, 1.5], [7.0, 7.0]], dtype=torch.float64)
    batch: Any = SimpleNamespace(reference_of=lambda images: images)
    settings = StepSettings(0, 1.0, 0.0, None, 0.5)
    gradient = regularizer_gradients(preset, batch, settings, images, multipliers)[True]

    def loss(x: Tensor) -> Tensor:
        own, fixed = (penalty.value(x, x) for penalty in preset.penalties)
        return 0.5 * (multipliers[0] * own + 0.3 * fixed)  # a fixed weight does not follow the multipliers

    for at in ((0, 0, 1, 2), (1, 2, 4, 3), (1, 1, 5, 0)):
        step = torch.zeros_like(images)
        step[at] = 1e-6
        difference = (loss(images + step) - loss(images - step)).sum().item() / 2e-6
        assert gradient[at].item() == pytest.approx(difference, rel=1e-5)


def test_the_mean_of_a_penalty_is_that_of_its_terms() -> None:
    ramp = (torch.arange(6.0) / 10).expand(1, 3, 4, 6)  # 60 steps of 0.1 to the right, 54 of 0 down
    assert TotalVariation(softness=1e-7).mean(ramp, ramp).item() == pytest.approx(6.0 / 114, abs=1e-5)
    halves = torch.tensor([0.0, 1.0]).expand(1, 3, 5, 2)
    assert [PENALTIES[name]().mean(halves, halves).item() for name in ("l1", "l2", "lp")] == [0.5, 0.25, 1.0]
    small, large = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 128, 128)
    for name in ("tv", "l1", "l2", "lp", "blur", "high_frequency"):  # white noise of two sizes
        penalty = PENALTIES[name]()
        assert penalty.mean(small, small).item() == pytest.approx(penalty.mean(large, large).item(), rel=0.1), name
        assert penalty.natural_value < penalty.mean(large, large).item()


def test_a_multiplier_moves_by_the_relative_excess_of_its_own_image() -> None:
    penalty = L2(weight=2.0, budget=0.1)
    state = torch.full((5,), 2.0)
    means = torch.tensor([0.1, 0.15, 0.05, 0.9, torch.nan])
    excess = np.array([0, 0.5, -0.5, 1.0, 0])
    multipliers, following = penalty.controlled(state, means)
    assert following.tolist() == pytest.approx((2 * np.exp(image_regularizers.BUDGET_RATE * excess)).tolist(), rel=1e-5)
    assert multipliers.tolist() == pytest.approx(
        (2 * np.exp(image_regularizers.BUDGET_GAIN * excess)).tolist(), rel=1e-5
    )
    assert all(torch.equal(part, state) for part in L2(weight=2.0).controlled(state, means))
    for _ in range(200):
        _, state = penalty.controlled(state, means)
    assert state.tolist() == pytest.approx([2.0, 2000.0, 0.002, 2000.0, 2.0])


@pytest.mark.parametrize("name", list(PENALTIES))
def test_no_penalty_couples_images(name: str) -> None:
    images, first = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8)
    penalty = penalty_of(name)
    assert torch.allclose(penalty.value(images, first)[1:2], penalty.value(images[1:2], first[1:2]), rtol=1e-5)


def test_a_grey_picture_costs_nothing_and_noise_costs_most() -> None:
    grey = torch.full((1, 3, 16, 16), 0.5)
    noise = torch.rand(1, 3, 16, 16)
    ramp = torch.linspace(0.2, 0.8, 16).expand(1, 3, 16, 16)
    for name in PENALTIES:
        penalty = penalty_of(name)
        assert penalty.value(grey, grey).item() == pytest.approx(0, abs=1e-5), name
        if name not in ("l1", "l2", "lp", "prior"):
            assert penalty.value(noise, grey) > penalty.value(ramp, grey) > -1e-6, name


def test_total_variation_counts_steps() -> None:
    edge = torch.zeros(1, 1, 4, 6)
    edge[..., 3:] = 1
    assert TotalVariation(softness=1e-6).value(edge, edge).item() == pytest.approx(4, abs=1e-3)


@pytest.mark.parametrize("width", [16, 17])
def test_high_frequency_energy_is_that_of_the_pixels(width: int) -> None:
    """Parseval: with the cutoff below every frequency but 0, it is the sum of squares about the mean."""
    images = torch.rand(2, 3, 12, width)
    about = images - images.mean(dim=(2, 3), keepdim=True)
    energy = HighFrequency(cutoff=1e-6).value(images, images)
    assert torch.allclose(energy, about.pow(2).sum(dim=(1, 2, 3)), rtol=1e-4)


def test_probability_falls_when_others_rise_and_the_logit_does_not() -> None:
    calm, loud = torch.zeros(1, 5, 1, 1), torch.zeros(1, 5, 1, 1)
    calm[0, 2], loud[0, 2], loud[0, 4] = 3, 3, 6
    one = torch.tensor([2]), torch.tensor([0]), 1
    value = {n: [OBJECTIVES[n]().value(Activations(m, *one)).item() for m in (calm, loud)] for n in OBJECTIVES
             if n in ("logit", "probability", "log_probability")}  # fmt: skip
    assert value["logit"][0] == value["logit"][1] == 3
    assert value["probability"][1] < 0.1 < value["probability"][0]
    assert value["log_probability"] == pytest.approx([np.log(v) for v in value["probability"]], rel=1e-5)


def test_squashed_logits_are_functions_of_the_logit_whose_slopes_die() -> None:
    maps = torch.zeros(1, 5, 1, 1).requires_grad_(True)
    at = torch.tensor([2]), torch.tensor([0]), 1
    slope = {}
    for z in (0.0, 6.0):
        logits = torch.zeros(1, 5, 1, 1).index_fill(1, torch.tensor([2]), z).requires_grad_(True)
        for squash, value in {
            "sigmoid": 1 / (1 + np.exp(-z)),
            "tanh": np.tanh(z),
            "softmax": np.exp(z) / (np.exp(z) + 4),
            "log_softmax": z - np.log(np.exp(z) + 4),
        }.items():
            found = SquashedLogit(squash).value(Activations(logits, *at))
            assert found.item() == pytest.approx(value, rel=1e-5)
            slope[squash, z] = torch.autograd.grad(found.sum(), logits)[0][0, 2].item()
    assert slope["sigmoid", 6.0] == pytest.approx(np.exp(-6), rel=0.01)
    assert slope["tanh", 6.0] == pytest.approx(4 * np.exp(-12), rel=0.01)
    same = SquashedLogit("softmax").value(Activations(maps, *at))
    assert torch.equal(same, OBJECTIVES["probability"]().value(Activations(maps, *at)))


def test_energy_sees_stripes_that_the_mean_of_an_edge_detector_does_not() -> None:
    """A horizontal difference of pixels: its mean over the map is 0 for any periodic image, stripes or not."""
    stripes = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(3).expand(8, 12)
    images = torch.stack([torch.ones(8, 12), stripes, 3 * stripes])[:, None]
    maps = images.roll(-1, 3) - images.roll(1, 3)
    activations = Activations(maps, torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 1)
    assert torch.allclose(OBJECTIVES["channel"]().value(activations), torch.zeros(3), atol=1e-6)
    assert torch.allclose(OBJECTIVES["energy"]().value(activations), torch.tensor([0.0, 4.0, 36.0]))
    shifted = dataclasses.replace(activations, outputs=maps + 5)
    assert torch.allclose(OBJECTIVES["energy"]().value(shifted), torch.tensor([0.0, 4.0, 36.0]), atol=1e-4)


def test_rectified_values_are_positive_where_a_map_is() -> None:
    """A map of two signs whose mean is 0, and one that is off everywhere."""
    maps = torch.tensor([[[[3.0, -1.0], [-1.0, -1.0]]], [[[-1.0, -2.0], [-3.0, -2.0]]]])
    activations = Activations(maps, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 1)
    assert torch.allclose(OBJECTIVES["rectified"]().value(activations), torch.tensor([0.675, -0.2]))
    assert torch.allclose(OBJECTIVES["rectified"](slope=0.0).value(activations), torch.tensor([0.75, 0.0]))
    assert torch.allclose(OBJECTIVES["rectified"](slope=1.0).value(activations), torch.tensor([0.0, -2.0]))


def test_a_direction_is_a_channel_where_it_points_along_one(tmp_path: Path) -> None:
    path = tmp_path / "axes.npy"
    np.save(path, np.eye(6)[[4, 1]])
    maps = torch.randn(2, 6, 3, 4)
    direction = Direction(ConfigFile(str(path)).read("x"))
    found = direction.value(Activations(maps, torch.tensor([0, 1]), torch.zeros(2), 1))
    assert torch.allclose(found, torch.stack([maps[0, 4].mean(), maps[1, 1].mean()]), atol=1e-6)
    aligned = Direction(ConfigFile(str(path)).read("x"), power=2.0)
    assert aligned.value(Activations(torch.zeros(1, 6, 2, 2), torch.tensor([0]), torch.zeros(1), 1)).item() == 0


def test_an_interpolation_goes_from_one_end_to_the_other() -> None:
    own, deep = torch.zeros(3, 2, 1, 1), torch.zeros(3, 2, 1, 1)
    own[:, 0], deep[:, 1] = 10, 20
    value = Interpolate(to="deep:1").value(
        Activations(own, torch.zeros(3, dtype=torch.long), torch.arange(3), 3, {"deep": deep})
    )
    assert value.tolist() == [10, 15, 20]


def facts(classifier: bool = False, variants: int = 1) -> LayerInfo:
    return LayerInfo("late", 8, classifier, {"late": 8, "stem": 6}, variants)


@pytest.mark.parametrize(
    ("objective", "why"),
    [
        (Interpolate(), "needs a second unit"),
        (Interpolate(to="stem:2"), "render.variants of at least 2"),
        (Joint(with_units=()), "needs at least one layer:channel"),
        (Joint(with_units=("stem:2",), weights=(1.0, 2.0)), "as many entries as with_units"),
        (Joint(with_units=("stam:2",)), "no layer 'stam'"),
        (Joint(with_units=("stem:6",)), "stem has 6 channels"),
        (Facet(facet_targets(6)), "embedding is missing"),
        (Facet(facet_targets(6), "stem"), r"holds 2 centers: set render\.variants=2"),
        (Facet(facet_targets(4), "stam"), "no layer 'stam'"),
        (Facet(facet_targets(4), "stem"), "does not fit stem, which has 6 channels"),
        (Joint(with_units=("stem",)), "is not a unit: write layer:channel"),
        (OBJECTIVES["logit"](), "needs the classifier's logits, which late does not hold"),
        (OBJECTIVES["probability"](), "render/objective=channel"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_fix(objective: Objective, why: str) -> None:
    with pytest.raises(AtlasError, match=why):
        objective.check(facts())


def test_vectors_must_fit_the_layer(vectors: ConfigFile, tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="holds 4 vectors of 6 numbers; late needs vectors of 8 numbers"):
        Direction(vectors).check(facts())
    np.save(tmp_path / "objects.npy", np.array(["a"], dtype=object), allow_pickle=True)
    with pytest.raises(AtlasError, match=r"is not an \.npy or \.npz of plain numbers"):
        Direction(load_config_files(ConfigFile(str(tmp_path / "objects.npy")), "x")).check(facts())


def test_equal_pictures_have_cosine_one_and_the_term_is_lowest() -> None:
    same = torch.randn(1, 1, 5, 4, 4).expand(2, 3, 5, 4, 4)
    assert torch.allclose(gram_cosine(same), torch.ones(2, 3, 3), atol=1e-5)
    assert torch.allclose(Diversity().value(same), torch.full((2, 3), -1.0), atol=1e-5)
    other = torch.randn(2, 3, 5, 4, 4)
    assert (Diversity().value(other) > -1).all()


def test_alignment_pulls_neighbours_only() -> None:
    groups = torch.zeros(1, 3, 1, 1, 1)
    groups[0, :, 0, 0, 0] = torch.tensor([0.0, 1.0, 3.0])
    assert Alignment().value(groups).tolist() == [[-0.5, -2.5, -2.0]]


def test_preconditioners() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(2, 3, 32, 32) * torch.tensor([1.0, 1e-4]).view(2, 1, 1, 1)
    assert torch.allclose(rms(Normalise().apply(gradient, None)), torch.ones(2, 1, 1, 1), atol=1e-4)
    assert torch.equal(Normalise().apply(torch.zeros(1, 3, 4, 4), None), torch.zeros(1, 3, 4, 4))
    assert torch.equal(Sign().apply(torch.tensor([[[[-3.0, 0.0, 0.1]]]]), None), torch.tensor([[[[-1.0, 0.0, 1.0]]]]))
    smooth = BlurGradient(1.0).apply(gradient, None)
    assert torch.equal(BlurGradient(9.0).apply(gradient, 1.0), smooth) and rms(smooth)[0] < 0.4
    spectra = [torch.fft.rfft2(g)[0, 0] for g in (gradient, ScaleSpectrum(1.0).apply(gradient, None))]
    ratio = (spectra[1].abs() / spectra[0].abs())[0]
    assert ratio[:4].tolist() == pytest.approx([1, 1, 1 / 2, 1 / 3], rel=1e-3)
