"""What a preset may ask of the loop: schedules, blurs, noise on the network, couplings, plateaus, photographs."""

import contextlib
import dataclasses
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import compose, tiny_model
from torch import Tensor, nn

from pipeline.acceleration.redirected_relu import redirected
from pipeline.cli.overrides import conf_folder
from pipeline.core.config_files import ConfigFile, load_config_files
from pipeline.core.errors import AtlasError
from pipeline.images.gradient_preconditioners import BlurGradient
from pipeline.images.image_regularizers import L2, Prior, TotalVariation
from pipeline.images.parameterizations import Fourier, FromImage, Maco, Pixel
from pipeline.images.transforms import Crop, Jitter, Noise, Rotate
from pipeline.layers.finding import Layer, capture, enumerate_layers
from pipeline.models.loading import Model, load_model
from pipeline.visualization import preset, step
from pipeline.visualization.batch_terms import Alignment, Diversity, gram_cosine
from pipeline.visualization.evaluation import Visualization
from pipeline.visualization.loop import render
from pipeline.visualization.network_perturbations import Dropout, Ensemble, NetworkPerturbation, WeightNoise
from pipeline.visualization.objectives import OBJECTIVES, Auto, Channel, Facet, Interpolate, Neuron
from pipeline.visualization.optimizers import Adam, Sgd
from pipeline.visualization.preset import Preset
from pipeline.visualization.render_job import RenderJob
from pipeline.visualization.schedules import Plateau, Stage, check, expand_schedule, is_flat

PRESET = Preset(
    name="test",
    objective=Channel(),
    canvas=Fourier(decay=1.0),
    transforms=(Jitter(2), Rotate(5)),
    optimizer=Adam(lr=0.1, beta1=0.9, beta2=0.99, damping=0.03, joint=False, warmup=2, floor=0.1, fall="cosine"),
    steps=16,
    size=32,
    margin=4,
)


def made(model: Model, layer: Layer, units: list[tuple[int, int]], **changes: object) -> list[Visualization]:
    others = {la.name: la for la in enumerate_layers(model)}
    config = dataclasses.replace(PRESET, **changes)  # type: ignore[arg-type]
    return render(RenderJob(model, layer, config, 0, layers=others), units)


def apart(a: Visualization, b: Visualization) -> int:
    """Largest difference of two pictures, in grey levels."""
    return int(np.abs(a.image.astype(int) - b.image.astype(int)).max())


# Whatever a preset asks for, these hold for it.
METHODS: dict[str, dict[str, object]] = {
    "negative": {"negative": True},
    "penalty": {"penalties": (TotalVariation(0.5),)},
    "budget": {"penalties": (TotalVariation(0.5, budget=0.05), L2(budget="natural"))},
    "absolute penalty": {"penalties": (TotalVariation(0.01, relative=False),)},
    "gradient blur": {"preconditioners": (BlurGradient(1.0),), "schedule": (Stage(gradient_blur=(2.0, 0.5)),)},
    "image blur": {"schedule": (Stage(blur=(1.0, 0.0)),)},
    "coarse to fine": {"schedule": (Stage(0.5, canvas=0.5), Stage(0.5))},
    "window": {"schedule": (Stage(view=0.5),), "transforms": (Crop(),)},
    "weight noise": {"augmentations": (WeightNoise(sd=0.05, every=2),)},
    "dropout": {"augmentations": (Dropout(p=0.2),)},
    "noise": {"transforms": (Noise(0.05), Jitter(2))},
    "clipped pixels": {"canvas": Pixel(clip=True), "optimizer": Adam(0.02, 0, 1.0, "cosine", 0.9, 0.999, 0.0, False)},
    "plateau": {"stop": Plateau(patience=2, least=6, tolerance=0.3)},
    "oblong": {"size": (24, 40)},
}


@pytest.mark.parametrize("method", list(METHODS))
def test_alone_and_in_a_batch_the_same_rising_picture(tiny: Model, tiny_layers: dict[str, Layer], method: str) -> None:
    changes = METHODS[method]
    together = made(tiny, tiny_layers["late"], [(c, 0) for c in range(6)], **changes)
    (alone,) = made(tiny, tiny_layers["late"], [(4, 0)], **changes)
    assert apart(alone, together[4]) <= 1 and alone.steps == together[4].steps
    sign = -1 if method == "negative" else 1
    assert all(sign * p.activation > sign * p.start for p in together)
    assert len({p.image.tobytes() for p in together}) == 6


@pytest.mark.parametrize(
    "name", sorted(set(OBJECTIVES) - {"direction", "directions", "joint", "interpolate", "caricature", "facet"})
)
def test_every_objective_rises_and_is_that_of_the_saved_picture(
    tiny: Model, tiny_layers: dict[str, Layer], name: str
) -> None:
    layer = tiny_layers["head" if "logit" in name or "probability" in name else "late"]
    objective = OBJECTIVES[name]()
    (picture,) = made(tiny, layer, [(3, 0)], objective=objective)
    image = torch.from_numpy(picture.image).permute(2, 0, 1)[None].float() / 255
    from pipeline.visualization.objectives import Activations

    with capture(tiny, [layer]) as forward, torch.no_grad():
        maps = forward(image)[layer.name]
        value = objective.value(Activations(maps, torch.tensor([3]), torch.tensor([0]), 1)).item()
    assert picture.activation == pytest.approx(value, abs=1e-5) and picture.activation > picture.start


def test_a_facet_raises_the_unit_and_the_cosine_with_its_own_center(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    late, head = tiny_layers["late"], tiny_layers["head"]

    def responses(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return the means of channel 3 of `late`, (B,), and those of all channels of `head`, (B, 5)."""
        with capture(tiny, [late, head]) as forward, torch.no_grad():
            maps = forward(images)
        return maps["late"][:, 3].mean((1, 2)).numpy(), maps["head"].mean((2, 3)).numpy()

    colors = torch.eye(3)[:2, :, None, None].expand(2, 3, 32, 32)
    red, green = responses(colors)[1]
    deviation = np.where(np.arange(len(red)) == 1, 0.0, 0.1)  # a channel that does not count
    center, buffer = np.stack([red - green, green - red]), io.BytesIO()
    np.savez(buffer, center=center, mean=(red + green) / 2, deviation=deviation)
    objective = Facet(ConfigFile("facets.npz", buffer.getvalue()), "head", 1.0)
    pair = made(tiny, late, [(3, 0), (3, 1)], objective=objective, variants=2, steps=48)
    pixels = torch.from_numpy(np.stack([picture.image for picture in pair])).permute(0, 3, 1, 2).float() / 255
    means, z = responses(pixels)
    z = np.where(deviation > 0, z - (red + green) / 2, 0) / 0.1
    cosine = z @ center.T / np.linalg.norm(z, axis=1)[:, None] / np.linalg.norm(center, axis=1)
    for row, picture in enumerate(pair):
        own = cosine[row, row]
        factor = own if own > 0.1 else 0.1 * np.exp(own / 0.1 - 1)
        scale = np.linalg.norm(center[row])
        expected = scale * np.logaddexp(0, means[row] / scale) * factor
        assert picture.activation == pytest.approx(expected, rel=1e-3) and picture.activation > picture.start
    assert cosine[0, 0] > 0.3 and cosine[1, 1] > 0.3
    (alone,) = made(tiny, late, [(3, 1)], objective=objective, variants=2, steps=48)
    assert apart(alone, pair[1]) <= 1


def test_a_budget_is_met_whatever_the_weight_begins_with(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    """With a fixed weight of 1 images are grey; with a budget the total variation is what was asked for."""
    settings: dict[str, object] = {"canvas": Pixel(), "transforms": (), "steps": 160, "margin": 4}
    (free,) = made(tiny, tiny_layers["late"], [(3, 0)], **settings)
    (fixed,) = made(tiny, tiny_layers["late"], [(3, 0)], **settings, penalties=(TotalVariation(2.0),))
    target = 0.06  # a little rougher than the median photograph
    assert free.measures["total_variation"] > 4 * target
    assert fixed.measures["total_variation"] < target / 2 and len(fixed.budget_values) == 0
    for weight in (0.02, 2.0):
        kept = made(
            tiny, tiny_layers["late"], [(2, 0), (3, 0)], **settings, penalties=(TotalVariation(weight, budget=target),)
        )
        for picture in kept:
            assert picture.budget_values[0] == pytest.approx(picture.measures["total_variation"], rel=0.05)
            assert picture.budget_values[0] == pytest.approx(target, rel=0.05) and picture.reason == ""
        assert fixed.activation < kept[1].activation < free.activation


def test_a_budget_that_is_not_met_is_said_with_the_value_reached(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    # Smoother than 8 bits; and more than white on gray, which is met by any image.
    penalties = (TotalVariation(budget=1e-6), L2(budget=10.0))
    (picture,) = made(tiny, tiny_layers["late"], [(3, 0)], penalties=penalties)
    variation, distance = picture.budget_values
    assert picture.status != "failed" and 0 < distance < 10
    assert picture.reason == f"tv of {variation:.3g} is above its budget of 1e-06"


def test_a_schedule_is_cut_into_its_shares() -> None:
    stages = (Stage(0.38, lr=(1.0, 1.0)), Stage(0.3), Stage(0.3, lr=(1.0, 0.5)), Stage(0.02))
    plan = expand_schedule(stages, 500)
    assert [sum(m.stage == i for m in plan) for i in range(4)] == [190, 150, 150, 10]
    third = [m.lr for m in plan if m.stage == 2]
    assert third[0] == 1.0 and third[75] == pytest.approx(0.75) and third[-1] == pytest.approx(0.5, abs=0.01)
    assert len(expand_schedule((), 7)) == 7 and [m.stage for m in expand_schedule(stages, 4)] == [0, 1, 2, 3]
    assert len(expand_schedule(stages, 2)) == 2


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        ((Stage(share=0.0),), "share=0.0 must be above 0"),
        ((Stage(canvas=0.5),), "last stage must have canvas=1"),
        ((Stage(view=1.5),), "0 < view ≤ canvas ≤ 1"),
        ((Stage(blur=(1.0, -1.0)),), "cannot be negative"),
    ],
)
def test_stages_without_sense_are_refused(stages: tuple[Stage, ...], why: str) -> None:
    with pytest.raises(AtlasError, match=why):
        check(stages)


def test_a_plateau_ends_a_picture_early_and_its_neighbours_go_on(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    stop = Plateau(patience=2, least=6, tolerance=0.1)
    pictures = made(tiny, tiny_layers["late"], [(c, 0) for c in range(8)], stop=stop, steps=48)
    steps = [p.steps for p in pictures]
    assert min(steps) < 48 and len(set(steps)) > 1
    assert all(p.status == "converged" for p in pictures if p.steps < 48)


def test_flat_means_little_was_gained_of_much() -> None:
    rising, level, fallen = (
        torch.arange(20.0),
        torch.cat([torch.arange(10.0), torch.full((10,), 9.0)]),
        -torch.arange(20.0),
    )
    assert is_flat(torch.stack([rising, level, fallen], 1), 4, 0.05).tolist() == [False, True, False]


def test_blurring_each_step_leaves_less_high_frequency(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    changes = {"canvas": Pixel(), "transforms": ()}
    (plain,) = made(tiny, tiny_layers["late"], [(0, 0)], **changes)
    others = [
        made(tiny, tiny_layers["late"], [(0, 0)], **changes, **more)[0]
        for more in (
            {"schedule": (Stage(blur=(1.0, 1.0)),)},
            {"preconditioners": (BlurGradient(2.0),)},
            {"penalties": (TotalVariation(2.0),)},
        )
    ]

    def roughness(picture: Visualization) -> float:
        return float(np.abs(np.diff(picture.image.astype(float), axis=0)).mean())

    assert all(roughness(other) < 0.6 * roughness(plain) for other in others)


def test_a_schedule_may_turn_to_another_head(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    """Half the steps for channel 2 of `relu#2`, half for channel 2 of `late`: between the two it is neither's."""
    units, layer = [(2, 0)], tiny_layers["late"]
    (own,) = made(tiny, layer, units)
    (both,) = made(tiny, layer, units, schedule=(Stage(0.5, layer="relu#2"), Stage(0.5)))
    (other,) = made(tiny, layer, units, schedule=(Stage(layer="relu#2"),))
    assert own.activation > both.activation > other.activation and apart(own, both) > 10


@pytest.mark.parametrize(
    "augmentation",
    [WeightNoise(sd=0.3), WeightNoise(sd=0.3, kind="multiplicative"), Dropout(p=0.3)],
    ids=["weight_noise", "multiplicative", "dropout"],
)
def test_augmentations_change_the_network_and_undo_it(
    tiny: Model, tiny_layers: dict[str, Layer], augmentation: NetworkPerturbation
) -> None:
    before = {k: v.clone() for k, v in tiny.module.state_dict().items()}
    image = torch.rand(1, 3, 32, 32)
    with capture(tiny, [tiny_layers["late"]]) as forward, torch.no_grad():
        clean = forward(image)["late"]
        with augmentation.applied(tiny.module, 7) as active:
            active.set_step(0)
            first = forward(image)["late"]
            active.set_step(1)
            second = forward(image)["late"]
            active.set_step(0)
            assert torch.equal(forward(image)["late"], first)
        assert torch.equal(forward(image)["late"], clean)
    assert not torch.equal(first, clean) and not torch.equal(first, second)
    assert all(torch.equal(v, before[k]) for k, v in tiny.module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.module.modules())


def test_augmentations_are_redrawn_every_so_often(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    image = torch.rand(1, 3, 32, 32)
    with (
        capture(tiny, [tiny_layers["late"]]) as forward,
        torch.no_grad(),
        WeightNoise(every=3).applied(tiny.module, 0) as active,
    ):
        said = []
        for step in range(6):
            active.set_step(step)
            said.append(forward(image)["late"])
    assert torch.equal(said[0], said[2]) and torch.equal(said[3], said[5]) and not torch.equal(said[2], said[3])


def test_multiplicative_noise_keeps_zeros_and_annealed_noise_ends_at_the_network() -> None:
    changed = tiny_model()
    weight = next(p for p in changed.module.parameters() if p.ndim > 1)
    with torch.no_grad():
        weight[0] = 0
        original = weight.clone()
        with WeightNoise(sd=0.5, kind="multiplicative").applied(changed.module, 0) as active:
            active.set_step(0)
            assert torch.equal(weight[0], original[0]) and not torch.equal(weight[1], original[1])
            ratio = (weight[1:] / original[1:]).flatten()
            assert ratio.std().item() == pytest.approx(0.5, rel=0.2)
        with WeightNoise(sd=0.5, anneal=True, every=10).applied(changed.module, 0) as active:
            distance = []
            for step in (0, 5, 9):
                active.set_step(step, step / 10)
                distance.append((weight - original).norm().item())
    # One draw, whose size falls with the share of the steps that is left.
    assert distance[1] / distance[0] == pytest.approx(0.5, rel=1e-3)
    assert distance[2] / distance[0] == pytest.approx(0.1, rel=1e-3)


def test_images_with_draws_of_their_own_do_not_depend_on_the_batch(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    late = tiny_layers["late"]
    noise = {"augmentations": (WeightNoise(sd=0.3, per_image=True),)}
    together = made(tiny, late, [(2, 0), (3, 0), (2, 1)], variants=2, **noise)
    alone = [made(tiny, late, [unit], variants=2, **noise)[0] for unit in [(2, 0), (3, 0), (2, 1)]]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(together, alone, strict=True))
    (shared,) = made(tiny, late, [(2, 0)], variants=2, augmentations=(WeightNoise(sd=0.3),))
    assert not np.array_equal(shared.image, alone[0].image)


def test_an_ensemble_pleases_all_its_members(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    other = tiny_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.module.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * weight.std().nan_to_num(0) * 0.7)
    augmentation = Ensemble(checkpoints=(ConfigFile("other.pt", b"read before"),))
    assert [augmentation.member(i) for i in range(4)] == [0, 1, 0, 1]
    config = dataclasses.replace(PRESET, augmentations=(augmentation,), steps=32)
    layer = tiny_layers["late"]
    (joint,) = render(RenderJob(tiny, layer, config, 0, ensemble=[other]), [(1, 0)])
    (alone,) = render(RenderJob(tiny, layer, dataclasses.replace(PRESET, steps=32), 0), [(1, 0)])

    def pleases(model: Model, picture: Visualization) -> float:
        image = torch.from_numpy(picture.image).permute(2, 0, 1)[None].float() / 255
        with capture(model, [layer]) as forward, torch.no_grad():
            return forward(image)["late"][0, 1].mean().item()

    assert pleases(other, joint) > pleases(other, alone) and joint.activation == pytest.approx(
        pleases(tiny, joint), abs=1e-5
    )


def test_gradients_are_redirected_in_the_member_of_the_ensemble_that_is_used(
    tiny: Model, tiny_layers: dict[str, Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, modules = tiny_model(), []

    def recorded(module: nn.Module) -> contextlib.AbstractContextManager[None]:
        modules.append(module)
        return redirected(module)

    monkeypatch.setattr(step, "redirected", recorded)
    monkeypatch.setattr(
        step, "has_zero_gradient", lambda gradient: torch.ones(len(gradient), 1, 1, 1, dtype=torch.bool)
    )
    ensemble = Ensemble(checkpoints=(ConfigFile("other.pt", b"read before"),))
    config = dataclasses.replace(PRESET, augmentations=(ensemble,), steps=4, attempts=1)
    render(RenderJob(tiny, tiny_layers["late"], config, 0, ensemble=[other]), [(1, 0)])
    assert modules == [tiny.module, other.module] * 2


def test_diversity_makes_siblings_differ(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    units = [(c, v) for c in (1, 4) for v in range(3)]
    layer = tiny_layers["stem"]

    def likeness(pictures: list[Visualization]) -> float:
        images = torch.stack([torch.from_numpy(p.image).permute(2, 0, 1).float() / 255 for p in pictures])
        with capture(tiny, [layer]) as forward, torch.no_grad():
            cosine = gram_cosine(forward(images)["stem"].unflatten(0, (2, 3)))
        return float(cosine.sum() - 6) / 12

    plain = made(tiny, layer, units, variants=3, steps=32)
    diverse = made(tiny, layer, units, variants=3, steps=32, couplings=(Diversity(2.0),))
    assert likeness(diverse) < likeness(plain) - 0.05
    # A unit's siblings are all that its pictures see.
    alone = made(tiny, layer, units[:3], variants=3, steps=32, couplings=(Diversity(2.0),))
    assert all(apart(a, b) <= 1 for a, b in zip(alone, diverse, strict=False))


def test_an_interpolation_is_aligned_and_each_step_is_between(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    layer = tiny_layers["late"]
    changes = {"objective": Interpolate(to="late:4"), "variants": 3, "couplings": (Alignment(0.05),), "steps": 32}
    pictures = made(tiny, layer, [(1, v) for v in range(3)], **changes)
    images = torch.stack([torch.from_numpy(p.image).permute(2, 0, 1).float() / 255 for p in pictures])
    with capture(tiny, [layer]) as forward, torch.no_grad():
        maps = forward(images)["late"].mean((2, 3))
    assert maps[0, 4] < maps[1, 4] < maps[2, 4]
    assert (images[0] - images[1]).norm() < (images[0] - images[2]).norm()
    assert len({p.seed for p in pictures}) == 1


def test_a_picture_may_begin_with_a_photograph_and_stay_near(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    torch.manual_seed(0)
    photograph = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 5), (40, 40), mode="bicubic")[0].clamp(0.1, 0.9)
    found = []
    for weight in (0.0, 30.0):
        config = dataclasses.replace(PRESET, canvas=FromImage(), penalties=(Prior(weight),), transforms=(), steps=32)
        job = RenderJob(tiny, tiny_layers["late"], config, 0, initial_images={(0, 0): photograph})
        (picture,) = render(job, [(0, 0)])
        middle = (photograph[:, 4:36, 4:36].permute(1, 2, 0).numpy() * 255).round()
        found.append((picture.activation, np.abs(picture.image - middle).mean()))
        lazy = dataclasses.replace(config, steps=1, optimizer=Sgd(lr=1e-9))
        (still,) = render(dataclasses.replace(job, preset=lazy), [(0, 0)])
        assert np.abs(still.image - middle).max() <= 1
    assert found[0][0] > found[1][0] and found[1][1] < 0.5 * found[0][1]


def test_a_silent_unit_is_woken_and_its_neighbour_is_not_touched() -> None:
    """The rectifier passes nothing at the start: without a redirected gradient no step would ever be made."""
    model = tiny_model()
    stem = model.module.get_submodule("stem")
    norm = model.module.get_submodule("norm")
    assert isinstance(stem, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        stem.weight[0] = stem.weight[0].abs() * 0.2
        norm.bias[0] = -0.3  # a bright picture wakes it, noise about grey does not
        norm.weight[0], norm.running_mean[0], norm.running_var[0] = 1.0, 0.0, 1.0
    layer = next(la for la in enumerate_layers(model) if la.name == "relu")
    woken, neighbour = made(model, layer, [(0, 0), (3, 0)], canvas=Pixel(), transforms=(), steps=32)
    assert woken.start == 0 and woken.activation > 0 and woken.status != "failed"
    (alone,) = made(model, layer, [(3, 0)], canvas=Pixel(), transforms=(), steps=32)
    assert apart(alone, neighbour) <= 1


def test_redirection_is_per_image_and_goes_where_it_was() -> None:
    relu, six = nn.ReLU(), nn.ReLU6()
    x = torch.tensor([[-1.0, -2.0], [1.0, -2.0]], requires_grad=True)
    with redirected(nn.Sequential(relu, six)):
        (gradient,) = torch.autograd.grad(relu(x).sum(), x)
        assert gradient.tolist() == [[1, 1], [1, 0]]
        high = torch.tensor([[7.0, 8.0]], requires_grad=True)
        assert torch.autograd.grad(-six(high).sum(), high)[0].tolist() == [[-1, -1]]
        assert torch.autograd.grad(six(high).sum(), high)[0].tolist() == [[0, 0]]
        assert torch.equal(relu(x), x.clamp(min=0)) and torch.equal(six(high), torch.full((1, 2), 6.0))
    assert "forward" not in vars(relu) and torch.autograd.grad(relu(x).sum(), x)[0].tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["render=maco", "render/schedule=blur_image"], "its amplitudes are fixed"),
        (["render=maco", "render/schedule=coarse_to_fine"], "the maco canvas does not support"),
        (["render=maco", "render.canvas.colour=plain"], "colour must be measured"),
        (["render/couplings=[diversity]"], "render.variants of at least 2"),
        (["render/penalties=[prior]"], "needs render/canvas=image"),
        (["render/schedule=blur_gradient"], "has no blur that it applies to"),
        (["render/augmentations=[ensemble]"], "checkpoints is empty"),
        (
            ["render/penalties=[tv]", "render.penalties.tv.budget=0"],
            "null .a fixed weight., or a number above 0",
        ),
        (["render/penalties=[tv]", "render.penalties.tv.weight=0"], "must be above 0 with a budget"),
        (["render/penalties=[lp]", "render.penalties.lp.power=2"], "measured with power=6.0, not 2"),
        (
            ["render=image_prior", "render.penalties.prior.budget=natural"],
            "prior: budget=natural needs the class variable natural_value",
        ),
        (["render.canvas.colour=blue"], "is not one of plain, decorrelated, measured"),
        (["render.optimizer.lr=0"], "must be above 0"),
        (["render.optimizer.fall=quickly"], "is not one of cosine, linear"),
        (["render/augmentations=[dropout]", "render.augmentations.dropout.p=1"], r"must lie in \[0, 1\)"),
    ],
)
def test_presets_without_sense_are_refused(overrides: list[str], why: str) -> None:
    with pytest.raises(AtlasError, match=why):
        preset.check(load_config_files(compose(overrides).config.render, "render"), 3)


@pytest.mark.long
def test_oygard_goes_through_the_heads_of_googlenet() -> None:
    """Its auxiliary classifiers run in eval mode, and the steps on each of them move the picture."""
    request = compose(
        ["model=googlenet_aux", "model.weights=null", "render=oygard", "render.size=92", "render.steps=8"]
    )
    model, config = load_model(request.config.model), request.config.render
    with torch.no_grad():
        for module in model.module.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):  # as active, its activations fade to nothing in eval mode
                nn.init.kaiming_normal_(module.weight)
    assert [name for name, m in model.module.named_modules() if m.training] == [""]
    layers = {la.name: la for la in enumerate_layers(model)}
    preset.check_layer(config, layers["fc"], layers, True)
    heads = [dataclasses.replace(stage, layer=None) for stage in config.schedule]
    own, all_heads = (
        render(
            RenderJob(model, layers["fc"], dataclasses.replace(config, schedule=tuple(s)), 0, layers=layers), [(3, 0)]
        )[0]
        for s in (heads, config.schedule)
    )
    assert own.activation > own.start and apart(own, all_heads) > 3


def test_oygard_needs_its_heads(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    oygard = compose(["render=oygard"]).config.render
    with pytest.raises(AtlasError, match="needs a head 'aux2\\.fc2', which this network does not have"):
        preset.check_layer(oygard, tiny_layers["head"], tiny_layers, True)
    assert oygard.others == ("aux2.fc2", "aux1.fc2")
    alone = compose(["render=oygard", "render/schedule=blur"]).config.render
    preset.check_layer(alone, tiny_layers["head"], tiny_layers, True)


PRESETS = sorted(path.stem for path in (conf_folder() / "render").glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_renders(tiny: Model, tiny_layers: dict[str, Layer], name: str) -> None:
    blur = ["render/schedule=blur"] if name == "oygard" else []
    config = compose([f"render={name}", *blur, "render.size=32", "render.steps=12"]).config.render
    config = load_config_files(config, "render")
    preset.check(config, 3)
    units = [(c, v) for c in (0, 3) for v in range(config.variants)]
    side = 32 + 2 * config.margin
    starts: dict[tuple[int, int], Tensor] = dict.fromkeys(units, torch.full((3, side, side), 0.5))
    job = RenderJob(tiny, tiny_layers["late"], config, 0, initial_images=starts, layer_mean=torch.ones(8))
    pictures = render(job, units)
    sign: Callable[[float], float] = (lambda x: -x) if config.negative else (lambda x: x)
    assert all(sign(p.activation) > sign(p.start) for p in pictures)


def test_the_margins_and_maco_share_nothing_with_the_neuron_preset() -> None:
    """Presets are small diffs of distill: what they do not name, they inherit."""
    distill, neuron = (compose([f"render={n}"]).config.render for n in ("distill", "neuron"))
    assert dataclasses.replace(neuron, name="distill", objective=Auto(), size="auto") == distill
    assert isinstance(neuron.objective, Neuron) and isinstance(compose(["render=maco"]).config.render.canvas, Maco)
