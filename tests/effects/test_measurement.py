"""Effects of units: exact ablation against a plain loop, attribution where it is exact, any division of the work."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn

from pipeline.core.errors import AtlasError
from pipeline.data import image_loading
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Dataset, list_dataset
from pipeline.effects.config import EffectsConfig
from pipeline.effects.measurement import EffectsContext, attribute, measure, removal
from pipeline.effects.request import choose_images, request_effects, spread
from pipeline.effects.rest_of_network import COPIES, VIEWS, RestOfNetwork
from pipeline.effects.results import SUM_BITS, EffectsPart, split_by_layer
from pipeline.layers.finding import Layer, capture, enumerate_layers
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, prepare_module, weights_digest


@pytest.fixture
def dataset(photo_folder: Path) -> Dataset:
    return list_dataset(DataConfig(source="folder", root=str(photo_folder)), 3)


def model_of(module: nn.Module, size: int = 16) -> Model:
    recipe = Preprocessing((size, size), size, (0.5,) * 3, (0.25,) * 3)
    return Model(prepare_module(module), "made", recipe, weights_digest(module), ())


def context_of(model: Model, dataset: Dataset, outputs: str, batch: int = 4, ablated: int = 2) -> EffectsContext:
    layers = [layer for layer in enumerate_layers(model) if layer.name not in (outputs, "output")]
    by_name = {layer.name: layer for layer in enumerate_layers(model)}
    rng = np.random.default_rng(3)
    means = [rng.normal(size=layer.channels).astype(np.float32) for layer in layers]
    channels = [spread(range(layer.channels), ablated) for layer in layers]
    return EffectsContext(model, layers, by_name[outputs], means, channels, dataset, batch)


def images_of(model: Model, dataset: Dataset, count: int) -> Tensor:
    loaded = image_loading.load_images(dataset, range(count), model.preprocessing)
    return torch.from_numpy(np.stack([item.array for item in loaded if item.array is not None])).float() / 255


def plain_effects(model: Model, layer: Layer, channel: int, value: float, images: Tensor) -> np.ndarray:
    """The effect on all outputs, by a hook that changes one channel and nothing else of this project."""
    module, count = model.module.get_submodule(layer.module), 0

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        layer.maps(changed, len(images))[:, channel] = value
        return changed

    def after(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return change(output) if count == layer.call else output

    def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal count
        count += 1
        return (change(args[0]), *args[1:]) if count == layer.call else args

    with torch.no_grad():
        full = model.module(model.normalize(images))
        handle = module.register_forward_pre_hook(before) if layer.side == "in" else module.register_forward_hook(after)
        removed = model.module(model.normalize(images))
        handle.remove()
    return (full - removed).numpy()


def test_ablations_equal_a_plain_loop(dataset: Dataset) -> None:
    """In-place activations, an activation module that is used twice, a residual sum: for every layer."""
    model = tiny_model()
    context = context_of(model, dataset, "head")
    part = measure(context, range(3))
    result = split_by_layer(
        part, [x.name for x in context.layers], [x.channels for x in context.layers], context.ablated, "head"
    )
    images = images_of(model, dataset, 3)
    assert {layer.call for layer in context.layers} == {1, 2}
    for layer, mean, own in zip(context.layers, context.means, context.ablated, strict=True):
        effects = result.layers[layer.name]
        for row, channel in enumerate(own):
            for name, value in (("zero", 0.0), ("mean", float(mean[channel]))):
                expected = plain_effects(model, layer, channel, value, images)
                np.testing.assert_allclose(
                    effects.top[name][row], expected[range(3), part.top], rtol=1e-5, atol=1e-5, err_msg=layer.name
                )
                np.testing.assert_allclose(effects.mean[name][row], expected.mean(0), rtol=1e-5, atol=1e-5)
                np.testing.assert_allclose(effects.deviation[name][row], expected.std(0, ddof=1), rtol=1e-3, atol=1e-3)
    assert part.ablations["zero"][1].dtype == np.int64 and SUM_BITS == 32


class Linear(nn.Module):
    """A convolution, a mean and a linear layer: a first-order approximation is exact."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


def test_attribution_is_exact_for_a_linear_network(dataset: Dataset) -> None:
    context = context_of(model_of(Linear()), dataset, "head", ablated=5)
    part = measure(context, range(5))
    np.testing.assert_allclose(part.attribution, part.ablations["mean"][0], rtol=1e-4, atol=1e-5)
    assert np.abs(part.attribution).max() > 0.01


class Saturated(Linear):
    """The gradient is zero where the activation is large: attribution misses what ablation finds."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head((100 * self.conv(x).abs()).mean((2, 3)).clamp(max=1))


def test_attribution_misses_what_saturates(dataset: Dataset) -> None:
    part = measure(context_of(model_of(Saturated()), dataset, "head", ablated=5), range(3))
    assert np.abs(part.attribution).max() == 0 and np.abs(part.ablations["zero"][0]).max() > 0.01


def test_any_division_gives_the_same_bytes(dataset: Dataset) -> None:
    context = context_of(model_of(Linear()), dataset, "head", batch=4)
    whole = measure(context, range(14)).arrays()
    parts = [measure(context, range(a, b)) for a, b in ((0, 8), (8, 12), (12, 14))]
    joined = EffectsPart.joined([EffectsPart.from_arrays(part.arrays()) for part in parts]).arrays()
    assert whole.keys() == joined.keys()
    for name, array in whole.items():
        assert array.tobytes() == joined[name].tobytes() or array.dtype == object, name


def test_images_that_cannot_be_read_are_left_out(photo_folder: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(photo_folder.rglob("*.png"))[:4]):
        (tmp_path / f"{number}.png").write_bytes(path.read_bytes()[: 40 if number == 1 else None])
    listed = list_dataset(DataConfig(source="folder", root=str(tmp_path)), 3)
    part = measure(context_of(model_of(Linear()), listed, "head"), range(4))
    assert part.index.tolist() == [0, 2, 3] and [index for index, _ in part.failed] == [1]
    nothing = measure(context_of(model_of(Linear()), listed, "head"), range(1, 2))
    assert EffectsPart.joined([nothing, part]).index.tolist() == [0, 2, 3]


class InPlace(nn.Module):
    """Changes the result of a module in place, behind its back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.act, self.head = nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        out += self.second(x)
        return self.head(self.act(out).mean((2, 3)))


class Table(InPlace):
    """Has a module that returns a table for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.table(torch.arange(4))
        return self.head(self.act(self.first(x)).mean((2, 3)) @ scores)


@pytest.mark.parametrize(("build", "repetition"), [(Linear, VIEWS), (InPlace, COPIES), (Table, "")])
def test_stored_results_are_used_where_they_give_the_same_outputs(
    build: Callable[[], nn.Module], repetition: str, dataset: Dataset
) -> None:
    model = model_of(build())
    layers = {layer.name: layer for layer in enumerate_layers(model)}
    layer = layers["act"] if "act" in layers else layers["conv"]
    images = images_of(model, dataset, 1)
    rest = RestOfNetwork(model, [layer], layers["head"])
    with torch.no_grad():
        full = rest.record(images)
        removed = rest.outputs_with(0, removal(layer, (0, 2), np.array([0.0, 0.5], np.float32)), 2)
    assert rest.repetitions == [repetition]
    for copy, (channel, value) in enumerate(((0, 0.0), (2, 0.5))):
        expected = plain_effects(model, layer, channel, value, images)[0]
        np.testing.assert_allclose((full - removed).numpy()[copy], expected, rtol=1e-4, atol=1e-6)
    assert all("forward" not in module.__dict__ for module in model.module.modules())


def test_one_recorded_pass_serves_all_layers(dataset: Dataset) -> None:
    """The outputs without a unit are to the last bit those of a recording for its layer alone."""
    model, batch = tiny_model(), 3
    layers = [layer for layer in enumerate_layers(model) if layer.name not in ("head", "output")]
    head = enumerate_layers(model)[-1]
    calls: Counter[str] = Counter()
    for name, module in model.module.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    with torch.no_grad():
        together = RestOfNetwork(model, layers, head)
        for images in images_of(model, dataset, 3).split(1):
            calls.clear()
            full = together.record(images)
        assert calls[""] == 1 and together.repetitions == [VIEWS] * len(layers)
        for number, layer in enumerate(layers):
            edit = removal(layer, range(batch), np.linspace(-1, 1, batch, dtype=np.float32))
            alone = RestOfNetwork(model, [layer], head)
            assert torch.equal(alone.record(images), full)
            removed = together.outputs_with(number, edit, batch)
            assert torch.equal(alone.outputs_with(0, edit, batch), removed) and not torch.equal(removed[:1], full)
    assert all("forward" not in module.__dict__ for module in model.module.modules())


class Scribbling(Linear):
    """Writes into what a module returned, behind all guards: a repeated result of a recording is spoilt."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(5, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv(x)
        for image in first:
            image += 1
        return self.head(self.second(first).mean((2, 3)))


def test_the_pass_is_recorded_again_where_a_check_spoils_its_results(dataset: Dataset) -> None:
    model = model_of(Scribbling())
    layers = {layer.name: layer for layer in enumerate_layers(model)}
    images = images_of(model, dataset, 1)
    rest = RestOfNetwork(model, [layers["conv"], layers["second"]], layers["head"])
    with torch.no_grad():
        full = rest.record(images)
        removed = [
            rest.outputs_with(n, removal(layers[name], (1,), np.zeros(1, np.float32)), 1)
            for n, name in enumerate(("conv", "second"))
        ]
    assert rest.repetitions == [VIEWS, COPIES]
    for name, outputs in zip(("conv", "second"), removed, strict=True):
        expected = plain_effects(model, layers[name], 1, 0.0, images)
        np.testing.assert_allclose((full - outputs).numpy(), expected, rtol=1e-4, atol=1e-6)


def test_layers_that_no_gradient_reaches_have_no_attribution(dataset: Dataset) -> None:
    class Detached(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).detach().mean((2, 3)) + x.mean((1, 2, 3))[:, None])

    model = model_of(Detached())
    context = context_of(model, dataset, "head")
    outputs, attribution, relevance = attribute(context, images_of(model, dataset, 2))
    assert np.isnan(attribution[:, :5]).all() and np.isnan(relevance[:, :5]).all() and outputs.shape == (2, 4)
    exact = measure(context, range(2)).ablations["zero"][0]
    assert np.isfinite(exact).all() and np.abs(exact).max() > 0


def test_a_layer_that_the_network_does_not_run(dataset: Dataset) -> None:
    model = tiny_model()
    context = context_of(model, dataset, "head")
    model.module.forward = lambda x: model.module.head(x.mean((2, 3)).repeat(1, 3)[:, :8])  # type: ignore[method-assign]
    with pytest.raises(AtlasError, match=r"did not run .*effects\.images=0"):
        attribute(context, images_of(model, dataset, 1))


def test_what_is_measured(dataset: Dataset, tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    candidates = list(tiny_layers.values())
    units = [(layer, range(layer.channels)) for layer in candidates]
    head = tiny_layers["head"]
    assert request_effects(EffectsConfig(), dataset, units, candidates, [head]) is None
    request = request_effects(EffectsConfig(images=100, ablated=3), dataset, units, candidates, [head])
    assert request is not None and request.outputs == head
    assert len(request.images) == 20 and list(request.images) == sorted(request.images)
    assert "head" not in [layer.name for layer in request.layers]
    assert all(len(own) == 3 for own in request.ablated)
    # A forward and a backward pass, one that is recorded for all layers, and parts of passes without the units.
    parts = 3 * 2 * sum(1 - layer.cost / head.cost for layer in request.layers)
    assert request.passes == pytest.approx(3 + 1 + parts)
    assert dataclasses.replace(request, ablated=((),) * len(request.layers)).passes == 3
    # Without a classifier the outputs are the last layer.
    features = request_effects(EffectsConfig(images=5), dataset, units[:2], candidates[:3], [])
    assert features is not None and features.outputs == candidates[2] and len(features.layers) == 2
    # All layers are outputs.
    assert request_effects(EffectsConfig(images=5), dataset, [(head, (0, 1))], candidates, [head]) is None
    assert spread((2, 5, 7, 9), 2) == (2, 9) and spread((2, 5), 0) == () and spread((4,), 8) == (4,)


def test_crops_of_one_image_count_once() -> None:
    samples = list_dataset(DataConfig(source="samples"), 3)
    chosen = choose_images(samples, 1000)
    assert len(chosen) == len({samples.images[index].source for index in chosen}) == 21
    assert (
        choose_images(samples, 5) == tuple(sorted(set(choose_images(samples, 5))))
        and len(choose_images(samples, 5)) == 5
    )


def test_maps_of_the_captured_layer_are_those_that_are_removed(dataset: Dataset) -> None:
    """A unit that is set to zero is zero at every position of the map that the atlas shows."""
    model = tiny_model()
    layer = {layer.name: layer for layer in enumerate_layers(model)}["block.0"]
    edit = removal(layer, (1, 3), np.zeros(2, np.float32))
    with torch.no_grad(), capture(model, [layer]) as forward:
        maps = forward(images_of(model, dataset, 2))["block.0"]
    assert maps is not None
    changed = layer.maps(edit(maps), 2)
    assert (changed[0, 1] == 0).all() and (changed[1, 3] == 0).all() and not (changed[0, 3] == 0).all()
