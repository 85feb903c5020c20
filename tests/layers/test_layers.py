"""Layers: what is found, what a name stands for, and that looking leaves no trace."""

import dataclasses
import warnings

import pytest
import torch
from conftest import TinyNet, tiny_model
from torch import nn

from pipeline.acceleration.batchnorm_folding import foldable_pairs
from pipeline.core.errors import AtlasError
from pipeline.layers.finding import Layer, capture, enumerate_layers
from pipeline.layers.layouts import Axes, as_maps
from pipeline.layers.path_depths import choose_depths, depths_before
from pipeline.layers.selection import LayersConfig, channels_of, select_layers
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, ModelConfig, load_model, prepare_module


def names(model: Model, **settings: object) -> list[str]:
    return [la.name for la in select_layers(model, enumerate_layers(model), LayersConfig(**settings))]  # type: ignore[arg-type]


def test_default_network_has_all_its_channels() -> None:
    model = load_model(ModelConfig("package", "efficientnet_lite0", weights=None))
    layers = select_layers(model, enumerate_layers(model), LayersConfig("convs"))
    # Counted another way: every module of the right type, whatever the trace saw.
    modules = [m for m in model.module.modules() if isinstance(m, nn.Conv2d)]
    convs = [la for la in layers if la.kind == "conv"]
    assert len(convs) == len(modules) == 49
    assert sum(la.channels for la in convs) == sum(m.out_channels for m in modules) == 21_008
    assert [(la.name, la.channels) for la in layers if la.kind == "linear"] == [("classifier", 1000)]
    tour = names(model, policy="tour")
    assert len(tour) == 9 and tour[0] == "conv_stem" and tour[-1] == "classifier"


@pytest.mark.parametrize(
    ("source", "name", "count", "some"),
    [
        ("package", "efficientnet_lite0", 16, ["blocks.0.0", "blocks.6.0"]),
        ("torchvision", "resnet18", 8, ["layer1.0", "layer4.1"]),
        ("timm", "test_vit", 6, ["blocks.0"]),
        ("timm", "test_efficientnet", 4, ["blocks.4.0"]),
    ],
)
def test_blocks_are_outputs_after_the_sum_not_branches(source: str, name: str, count: int, some: list[str]) -> None:
    """Wholes as many as in the papers, and not their branches, squeezes or MLPs; test_architectures has more."""
    found = names(load_model(ModelConfig(source, name, weights=None)), policy="blocks")
    assert len(found) == count and set(some) <= set(found)
    assert not any(a != b and a.startswith(b + ".") for a in found for b in found if b != "features")


def test_resnet50_has_the_channels_of_the_literature() -> None:
    model = load_model(ModelConfig("torchvision", "resnet50", weights=None))
    layers = select_layers(model, enumerate_layers(model), LayersConfig("convs"))
    assert sum(la.channels for la in layers if la.kind == "conv") == 26_560


def test_a_convolution_is_taken_after_its_norm_and_before_its_activation(tiny: Model) -> None:
    layers = {la.name: la for la in enumerate_layers(tiny)}
    images = torch.rand(2, 3, 32, 32)
    with capture(tiny, [layers["stem"], layers["relu"]]) as forward, torch.no_grad():
        seen = forward(images)
    net = tiny.module
    assert isinstance(net, TinyNet)
    expected = net.norm(net.stem(tiny.normalize(images)))
    assert torch.equal(seen["stem"], expected)
    assert seen["stem"].min() < 0 <= seen["relu"].min()


def test_fused_norm_and_activation_is_cut_between_the_two() -> None:
    model = load_model(ModelConfig("timm", "test_efficientnet", weights=None, input_size=64))
    stem = next(la for la in enumerate_layers(model) if la.name == "conv_stem")
    images = torch.rand(2, 3, 64, 64)
    with capture(model, [stem]) as forward, torch.no_grad():
        seen = forward(images)["conv_stem"]
    bn = model.module.get_submodule("bn1")
    raw = model.module.get_submodule("conv_stem")(model.normalize(images))
    expected = nn.functional.batch_norm(raw, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)  # type: ignore[arg-type]
    assert torch.allclose(seen, expected, atol=1e-5) and seen.min() < 0


def test_every_call_of_a_shared_module_is_a_layer(tiny: Model) -> None:
    found = {la.name: la for la in enumerate_layers(tiny)}
    assert (found["relu"].channels, found["relu#2"].channels) == (6, 8)
    with capture(tiny, [found["relu"], found["relu#2"]]) as forward, torch.no_grad():
        seen = forward(torch.rand(1, 3, 32, 32))
    assert seen["relu"].shape[1] == 6 and seen["relu#2"].shape[1] == 8


def test_looking_leaves_no_hook_behind_even_after_an_error(tiny: Model) -> None:
    layer = next(la for la in enumerate_layers(tiny) if la.name == "late")
    with pytest.raises(RuntimeError), capture(tiny, [layer]) as forward:
        forward(torch.rand(1, 7, 32, 32))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.module.modules())


def test_nothing_behind_the_target_is_run(tiny: Model) -> None:
    layer = next(la for la in enumerate_layers(tiny) if la.name == "stem")
    ran = []
    handle = tiny.module.get_submodule("late").register_forward_hook(lambda *_: ran.append(1))
    try:
        with capture(tiny, [layer]) as forward:
            forward(torch.rand(1, 3, 32, 32))
    finally:
        handle.remove()
    assert not ran


def test_prepared_networks_are_frozen_and_not_in_place() -> None:
    module = prepare_module(TinyNet().train())
    assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert not any(getattr(m, "inplace", False) for m in module.modules())


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("all", tuple(range(10))),
        ("0:3", (0, 1, 2)),
        ("::4", (0, 4, 8)),
        ("8:99", (8, 9)),
        ("spread:2", (2, 7)),
        ("spread:99", tuple(range(10))),
        ([7, 3, 3, 40], (3, 7)),
        (5, (5,)),
    ],
)
def test_channels(asked: str | int | list[int], expected: tuple[int, ...]) -> None:
    layer = next(la for la in enumerate_layers(wide()) if la.name == "0")
    assert channels_of(layer, asked) == expected


def wide() -> Model:
    module = prepare_module(nn.Sequential(nn.Conv2d(3, 10, 1)))
    return Model(module, "wide", Preprocessing((8, 8), 8, (0.5,) * 3, (0.5,) * 3), "", ())


@pytest.mark.parametrize("asked", ["first", "1:2:0", "spread:", "-3:"])
def test_channels_that_make_no_sense(asked: str) -> None:
    with pytest.raises(AtlasError, match=r"layers\.channels="):
        channels_of(enumerate_layers(wide())[0], asked)


def test_include_and_exclude() -> None:
    model = tiny_model()
    assert names(model, include=("block*",)) == ["block.0", "block.1", "block.2", "block"]
    assert names(model, policy="convs", include=("block*",)) == ["block.0"]
    assert names(model, policy="convs", exclude=("block*", "head")) == ["stem", "late"]
    assert names(model, policy="logits") == ["head"]


def test_an_unknown_layer_names_the_nearest() -> None:
    with pytest.raises(AtlasError, match=r"no layer matches 'blok\.0'. Nearest: block\.0"):
        names(tiny_model(), include=("blok.0",))
    with pytest.raises(AtlasError, match=r"Nearest: convs"):
        names(tiny_model(), policy="conv")


def test_layouts_put_the_channel_second() -> None:
    assert as_maps(torch.zeros(2, 5), Axes("vector")).shape == (2, 5, 1, 1)
    assert as_maps(torch.zeros(2, 7, 5), Axes("tokens")).shape == (2, 5, 1, 7)
    assert as_maps(torch.zeros(2, 3, 4, 5), Axes("maps_last")).shape == (2, 5, 3, 4)


def test_a_transformer_has_features_for_channels() -> None:
    model = load_model(ModelConfig("timm", "test_vit", weights=None))
    block = next(la for la in enumerate_layers(model) if la.name == "blocks.0")
    assert block.layout == "tokens" and block.channels == model.module.embed_dim


def test_the_maps_of_tokens_can_be_traced() -> None:
    """As for an export, in which sizes are tensors."""
    model = load_model(ModelConfig("timm", "test_vit", weights=None))
    layers = [la for la in enumerate_layers(model) if la.name == "blocks.0"]

    class Tapped(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return forward(image)["blocks.0"]

    images = [torch.rand(1, 3, *model.preprocessing.size) for _ in range(2)]
    with capture(model, layers) as forward, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Tapped(), images[0], check_trace=False)
        assert torch.allclose(traced(images[1]), forward(images[1])["blocks.0"])


class Bottleneck(nn.Module):
    """An inverted residual block with squeeze-and-excite and a linear output."""

    def __init__(self, channels: int, hidden: int, rectified: bool) -> None:
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.squeeze, self.excite = nn.Conv2d(hidden, 3 * hidden, 1), nn.Conv2d(3 * hidden, hidden, 1)
        self.project = nn.Conv2d(hidden, channels, 1)
        self.act = nn.ReLU() if rectified else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(self.expand(x).relu()).relu()
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.act(x + self.project(y))


def bottlenecks(*rectified: bool) -> Model:
    torch.manual_seed(0)
    blocks = [Bottleneck(6, 12, one) for one in rectified]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1000)]
    module = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.Sequential(*blocks), *head)
    recipe = Preprocessing((32, 32), 32, (0.5,) * 3, (0.25,) * 3)
    return Model(prepare_module(module), "made", recipe, "", ())


def test_a_tour_takes_of_each_block_the_layer_that_has_units() -> None:
    """Not the depthwise convolution; not the wider squeeze; the output of a block where a rectifier made it."""
    assert names(bottlenecks(False, True, False), policy="tour") == ["0", "1.0.expand", "1.1", "1.2.expand", "4"]


def test_residual_selects_the_linear_outputs_only() -> None:
    assert names(bottlenecks(False, True, False), policy="residual") == ["1.0", "1.2"]
    with pytest.raises(AtlasError, match=r"no block with a linear output.*layers=blocks"):
        names(bottlenecks(True, True), policy="residual")


@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("resnet18", ["conv1", "layer2.0", "layer4.1", "fc"]),
        ("mobilenet_v3_large", ["features.9.block.0.0", "features.15.block.0.0"]),
    ],
)
def test_tours_of_other_networks(name: str, some: list[str]) -> None:
    tour = names(load_model(ModelConfig("torchvision", name, weights=None)), policy="tour")
    assert len(tour) == 9 and set(some) <= set(tour)


def test_depths_are_spread_over_the_blocks_and_never_in_folded_modules(tiny: Model) -> None:
    candidates = enumerate_layers(tiny)
    folded = {path for pair in foldable_pairs(tiny) for path in pair}
    depths = choose_depths(tiny, candidates, folded)
    # The stem and its normalization are folded; nothing with weights follows the head.
    assert [depth.name for depth in depths] == ["relu", "block.2", "late"]
    layers = {layer.name: layer for layer in candidates}
    assert depths_before(layers["head"], depths) == depths
    for name in ("late", "relu#2"):  # the latter has the channels of the former
        assert [depth.name for depth in depths_before(layers[name], depths)] == ["relu", "block.2"]
    assert choose_depths(tiny, [layers["head"]]) == ()


def test_optional_layers_are_read_if_they_are_computed(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    seen: list[str] = []
    never = dataclasses.replace(tiny_layers["relu"], name="relu#9", call=9)
    images = torch.rand(2, 3, 32, 32)
    optional = [tiny_layers["relu"], never, tiny_layers["head"]]
    with capture(tiny, [tiny_layers["late"]], lambda layer, _: seen.append(layer.name), optional=optional) as forward:
        forward(images)
        forward(images)
    assert seen == ["relu", "late"] * 2  # the head is behind the last layer that is needed
    with pytest.raises(AtlasError, match="did not run relu#9"), capture(tiny, [never]) as forward:
        forward(images)
