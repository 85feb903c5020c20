"""Penalties on activations: statistics of normalizations against the formula, finite differences, and the fast path."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, compose, tiny_model
from PIL import Image
from torch import Tensor, nn

from pipeline.acceleration.batchnorm_folding import foldable_pairs
from pipeline.acceleration.variants import verified_variants
from pipeline.core.errors import AtlasError
from pipeline.data import datasets
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Dataset
from pipeline.engine.tasks import Setup, render_digest
from pipeline.images.image_regularizers import L2
from pipeline.layers.finding import Layer, capture, enumerate_layers
from pipeline.models.loading import Model, prepare_module
from pipeline.planning import natural_deviations
from pipeline.planning.planner import make_plan
from pipeline.runs.layer_worker import layer_worker
from pipeline.runs.runner import plan_run
from pipeline.visualization import preset as presets
from pipeline.visualization.loop import render
from pipeline.visualization.network_penalties import (
    NaturalDeviations,
    NormalizationStatistics,
    normalizations_before,
    weighted_penalties,
)
from pipeline.visualization.objectives import Energy
from pipeline.visualization.render_job import RenderJob


def images(count: int = 3, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(4))


def deviations(model: Model, reader: Model, layer: Layer, batch: Tensor) -> dict[str, Tensor]:
    """Deviation of each normalization before `layer`, read in `reader`."""
    found: dict[str, Tensor] = {}
    by_tap = {n.tap.name: n for n in normalizations_before(model, layer)}

    def note(tap: Layer, maps: Tensor) -> None:
        found[by_tap[tap.name].path] = by_tap[tap.name].deviation(maps)

    with capture(reader, [n.tap for n in by_tap.values()], each=note) as forward, torch.no_grad():
        forward(batch)
    return found


def test_only_normalizations_before_the_layer_count(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    """The normalization of the layer itself would hold the unit at its own mean."""
    both = ["norm", "block.1"]
    for name, paths in {"stem": [], "block.0": ["norm"], "block": both, "late": both, "head": both}.items():
        assert [n.path for n in normalizations_before(tiny, tiny_layers[name])] == paths, name


def test_deviation_is_that_of_the_inputs_of_the_normalization(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    """Read in the output, but equal to Yin et al.'s quantity over its input; a constant channel is left out."""
    model = tiny_model()
    norm = model.module.get_submodule("block.1")
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
    norm.running_var[2] = 0.0
    inputs: list[Tensor] = []
    handle = norm.register_forward_hook(lambda _, args, __: inputs.append(args[0].detach()))
    found = deviations(model, model, tiny_layers["late"], images())["block.1"]
    handle.remove()
    x, kept = inputs[-1].flatten(2).double(), [0, 1, 3, 4, 5]
    mean, sd = x.mean(2), x.std(2, correction=0)
    terms = (mean - norm.running_mean).pow(2) / norm.running_var + (sd / norm.running_var.sqrt() - 1).pow(2)
    assert torch.allclose(found.double(), terms[:, kept].mean(1), rtol=1e-4)
    assert not torch.isfinite(terms[:, 2]).any()


def test_folded_network_has_the_same_deviations(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    """Rectifiers that are fused with a convolution would hide the normalized values."""
    layer, size = tiny_layers["late"], (32, 32)
    norms = {n.path: n.tap for n in normalizations_before(tiny, layer)}
    found = verified_variants(tiny, foldable_pairs(tiny), [layer], "float32", size, norms)
    assert not found.reason and found.folded is not tiny and found.steps is not tiny
    expected = deviations(tiny, tiny, layer, images())
    for variant in (found.folded, found.steps, found.exact):
        for path, values in deviations(tiny, variant, layer, images()).items():
            assert torch.allclose(values, expected[path], rtol=1e-3), path


def test_gradient_against_finite_differences(tiny_layers: dict[str, Layer]) -> None:
    """In float64, through the network to the image, with an excess in both normalizations."""
    model = tiny_model()
    normalizations = [dataclasses.replace(n, natural=0.01) for n in normalizations_before(model, tiny_layers["late"])]
    model.module.double()
    by_tap = {n.tap.name: n for n in normalizations}
    batch = images(2, 12).double().requires_grad_(True)

    def value(batch: Tensor) -> Tensor:
        found: list[tuple[Tensor, float]] = []

        def note(tap: Layer, maps: Tensor) -> None:
            # The hook gives float32, as `capture` does for objectives; here the maps are wanted as they are.
            found.append((by_tap[tap.name].deviation(maps), by_tap[tap.name].natural))

        x = model.module.get_submodule("stem")(batch * 2 - 1)
        note(normalizations[0].tap, y := model.module.get_submodule("norm")(x))
        block = model.module.get_submodule("block")
        note(normalizations[1].tap, block.get_submodule("1")(block.get_submodule("0")(torch.tanh(y))))
        losses = weighted_penalties((NormalizationStatistics(2.0),), found)
        assert losses is not None and bool((losses > 0).all())
        return losses

    assert torch.autograd.gradcheck(value, (batch,), atol=1e-6)


def test_only_the_excess_over_natural_images_is_a_loss() -> None:
    penalty = NormalizationStatistics(3.0)
    measured = [(torch.tensor([0.5, 0.1]), 0.2), (torch.tensor([0.3, 0.3]), 0.3)]
    losses = weighted_penalties((penalty,), measured)
    assert losses is not None and torch.allclose(losses, torch.tensor([0.9, 0.0]))
    assert weighted_penalties((), measured) is None and weighted_penalties((penalty,), []) is None


def test_images_come_closer_to_the_statistics(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    """The preset, with the network that a worker gives it: less deviation than without the penalty."""
    layer = tiny_layers["late"]
    config = compose(["render=natural", "render.size=32", "render.steps=32", "render.margin=4"]).config.render
    normalizations = normalizations_before(tiny, layer)
    norms = {n.path: n.tap for n in normalizations}
    found = verified_variants(tiny, foldable_pairs(tiny), [layer], "float32", (40, 40), norms)
    totals = []
    for read in (normalizations, []):
        job = RenderJob(
            found.folded, layer, config, 0, (32, 32), step_model=found.steps, exact_model=found.exact,
            normalizations=read,
        )  # fmt: skip
        pictures = render(job, [(0, 0), (3, 0)])
        assert all(p.activation > p.start for p in pictures)
        batch = torch.from_numpy(np.stack([p.image for p in pictures])).permute(0, 3, 1, 2) / 255
        totals.append(sum(values.mean() for values in deviations(tiny, tiny, layer, batch).values()))
    assert totals[0] < 0.8 * totals[1]


class Residual(nn.Module):
    """A residual block that adds its input to the output of a normalization, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(x))
        if self.in_place:
            out += x
        else:
            out = out + x
        return self.head(torch.relu(out).mean((2, 3)))


def test_normalizations_may_be_overwritten_by_the_network(tiny: Model) -> None:
    """As in torchvision's ResNets, where the backward pass used to fail."""
    found = []
    for in_place in (False, True):
        model = dataclasses.replace(tiny, module=prepare_module(Residual(in_place)), name="residual")
        layer = {layer.name: layer for layer in enumerate_layers(model)}["head"]
        config = compose(["render.size=32", "render.steps=4", "render.margin=4"]).config.render.for_layer(layer)
        normalizations = normalizations_before(model, layer)
        assert len(normalizations) == 2 and config.network_penalties
        job = RenderJob(model, layer, config, 0, (32, 32), normalizations=normalizations)
        found += render(job, [(1, 0)])
    assert np.abs(found[0].image.astype(int) - found[1].image).max() <= 1


def test_images_do_not_depend_on_their_batch(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    layer = tiny_layers["late"]
    config = compose(["render=natural", "render.size=32", "render.steps=4", "render.margin=4"]).config.render
    job = RenderJob(tiny, layer, config, 0, (32, 32), normalizations=normalizations_before(tiny, layer))
    together, (alone,) = render(job, [(0, 0), (3, 0)]), render(job, [(3, 0)])
    assert np.abs(together[1].image.astype(int) - alone.image).max() <= 1


def dataset_of(folder: object, count: int) -> Dataset:
    for i in range(count):
        levels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(levels).save(f"{folder}/{i}.png")
    return datasets.list_dataset(DataConfig(source="folder", root=str(folder)), 3)


def test_natural_deviations_are_medians_over_dataset_images(
    tiny: Model, tiny_layers: dict[str, Layer], tmp_path: object
) -> None:
    dataset, layer = dataset_of(tmp_path, 17), tiny_layers["late"]
    found = natural_deviations.measure(tiny, tiny, dataset, [layer])
    levels = [np.array(Image.open(f"{tmp_path}/{i}.png")) for i in range(17)]
    batch = torch.from_numpy(np.stack(levels)).permute(0, 3, 1, 2) / 255
    expected = {path: float(values.median()) for path, values in deviations(tiny, tiny, layer, batch).items()}
    assert found.images == 17 and dict(found.medians) == pytest.approx(expected, rel=1e-4)
    few = natural_deviations.measure(tiny, tiny, Dataset((), {}), [layer])
    assert few.images == natural_deviations.MAX_IMAGES and few.source != found.source  # the packaged images


def test_visualizations_without_a_run_compare_with_the_dataset_of_their_settings(
    tiny: Model, tiny_layers: dict[str, Layer], tmp_path: Path
) -> None:
    dataset = dataset_of(tmp_path, 17)

    def natural(name: str, *settings: str) -> NaturalDeviations | None:
        config, layers = compose(list(settings)).config, list(tiny_layers.values())
        return layer_worker(tiny, config, layers, tiny_layers[name], tiny.to)[1].setup.natural

    own, packaged = natural("head", "data=folder", f"data.root={tmp_path}"), natural("head")
    assert own is not None and packaged is not None
    expected = natural_deviations.measure(tiny, tiny, dataset, [tiny_layers["head"]])
    assert dict(own.medians) == pytest.approx(dict(expected.medians), rel=1e-3)
    assert (own.images, packaged.images) == (17, natural_deviations.MAX_IMAGES)
    assert natural("late", "data=folder", f"data.root={tmp_path / 'absent'}") is None  # the dataset is not read


def test_natural_deviations_are_measured_once_in_a_run_folder(
    tmp_path: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured, measure = [], natural_deviations.measure

    def counted(*arguments: Any) -> NaturalDeviations:
        measured.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(natural_deviations, "measure", counted)
    own = [*TINY, "render=natural", "data=folder", f"data.root={photo_folder}", f"run.root={tmp_path}", "run.name=kept"]
    own.append("run.update=true")
    shallow = "layers.include=[blocks.1.0.*]"

    def planned(*settings: str, recorded: bool = False) -> NaturalDeviations:
        request = compose([*own, *settings])
        made = plan_run(request) if recorded else make_plan(request.config, timed=False)
        assert made.setup.natural is not None
        return made.setup.natural

    first = planned(shallow, recorded=True)
    assert planned(shallow) == first and len(measured) == 1 and first.images == 20
    # Fewer layers need no others; deeper ones do, other weights and a damaged file too.
    assert planned("layers.include=[blocks.1.0.conv_pwl]") == first and len(measured) == 1
    deep = planned("layers.include=[conv_head]", recorded=True)
    assert len(measured) == 2 and set(dict(first.medians)) < set(dict(deep.medians)) and deep.source == first.source
    assert planned(shallow) == deep and len(measured) == 2
    for number, (network, fingerprint) in enumerate([("a", "b"), ("c", "b"), ("a", "d")]):
        key = natural_deviations.identity(network, fingerprint)
        if not number:
            natural_deviations.write(tmp_path, deep, key)
        assert natural_deviations.kept([tmp_path], key, tiny_model(), []) == (None if number else deep)
    (tmp_path / "kept" / natural_deviations.FILE).write_text("{")
    assert planned("layers.include=[conv_head]") == deep and len(measured) == 3
    assert "cannot be read" in caplog.text


def test_networks_without_normalizations_are_refused(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    natural, distill = (compose([f"render={name}"]).config.render for name in ("natural", "distill"))
    net = prepare_module(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
    plain = dataclasses.replace(tiny, module=net, name="plain")
    layer = Layer("2", "conv", "2", 1, "out", "maps", 4, 28, 28, 1.0)
    with pytest.raises(AtlasError, match=r"plain has none before 2\. .* such as render=distill"):
        natural_deviations.check_normalizations(plain, [layer], [natural])
    natural_deviations.check_normalizations(plain, [layer], [distill])
    natural_deviations.check_normalizations(tiny, list(tiny_layers.values()), [natural])
    with pytest.raises(AtlasError, match="ensemble"):
        presets.check(
            compose(["render=natural", "render/augmentations=[ensemble]",
                     "render.augmentations.ensemble.checkpoints=[a.pt]"]).config.render, 3,
        )  # fmt: skip


def test_pooled_penalties_are_those_of_layers_without_positions(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    """The default: classes have the penalty, hidden units none, and nothing is refused where it cannot be computed."""
    made = compose([]).config.render
    assert made.name == "distill" and [p.layers for p in made.network_penalties] == ["pooled"]
    for name, layer in tiny_layers.items():
        own = made.for_layer(layer)
        pooled = name in ("pool", "head")
        assert len(own.network_penalties) == pooled, name
        # Without a budget the contrast grows with the steps to that of the harshest photographs.
        assert [p.budget for p in own.penalties if isinstance(p, L2)] == ["natural"] * pooled, name
        assert own.for_layer(layer) == own
    explicit = dataclasses.replace(made, penalties=(L2(budget=0.05),), objective=Energy())
    assert explicit.for_layer(tiny_layers["head"]).penalties == (L2(budget=0.05),)
    assert dataclasses.replace(made, objective=Energy()).for_layer(tiny_layers["stem"]).penalties == ()
    net = prepare_module(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    plain = dataclasses.replace(tiny, module=net, name="plain")
    head = dataclasses.replace(tiny_layers["head"], module="3")
    natural_deviations.check_normalizations(plain, [head], [made])
    none = Dataset((), {})
    assert natural_deviations.compared_layers(plain, [head], [made], none) == []
    layers = list(tiny_layers.values())
    assert {la.name for la in natural_deviations.compared_layers(tiny, layers, [made], none)} <= {"pool", "head"}
    bands = dataclasses.replace(tiny, preprocessing=dataclasses.replace(tiny.preprocessing, mean=(0.5,) * 5))
    assert natural_deviations.compared_layers(bands, layers, [made], none) == []  # the packaged images have 3 channels
    perturbed = compose(["render/augmentations=[ensemble]", "render.augmentations.ensemble.checkpoints=[a.pt]"])
    presets.check(perturbed.config.render, 3)
    assert perturbed.config.render.for_layer(tiny_layers["head"]).network_penalties == ()


def test_results_depend_on_the_images_that_are_compared_with(tiny_layers: dict[str, Layer]) -> None:
    for name, count in (("natural", 2), ("distill", 1)):
        config = compose([f"render={name}", "engine.precision=float32"]).config
        made = Setup(config, "0" * 64, (tiny_layers["late"],), Dataset((), {}), 1, "cpu")
        digests = {
            render_digest(
                dataclasses.replace(made, natural=NaturalDeviations(source, 20, ())), made.layers[0], (64, 64), name
            )
            for source in "ab"
        }
        assert len(digests) == count
