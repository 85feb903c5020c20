"""Receptive fields against the literature, and folding against the network it came from."""

import pytest
import torch
from conftest import TinyNet, tiny_model
from torch import nn
from torchvision.models import vgg

from pipeline.acceleration.batchnorm_folding import FoldedNorm, conv_norm_pairs, fold, foldable_pairs
from pipeline.layers.finding import ReceptiveField, capture, enumerate_layers
from pipeline.layers.receptive_fields import receptive_fields
from pipeline.layers.tracing import Trace
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, ModelConfig, load_model, prepare_module


def sizes(name: str, *layers: str) -> list[int | None]:
    model = load_model(ModelConfig("torchvision", name, weights=None))
    chosen = [la for la in enumerate_layers(model) if la.name in layers]
    found = receptive_fields(model, chosen)
    return [field and field.size[0] for field in (found[name] for name in layers)]


def test_resnet18() -> None:
    assert sizes("resnet18", "layer1", "layer2", "layer3", "avgpool") == [43, 99, 211, None]


def test_vgg11() -> None:
    # Its features alone: the 120 million weights of the classifier have no say here.
    module = prepare_module(vgg.make_layers(vgg.cfgs["A"]))
    model = Model(module, "vgg11", Preprocessing((128, 128), 128, (0.5,) * 3, (0.5,) * 3), "", ())
    found = receptive_fields(model, enumerate_layers(model))
    pools = [field.size[0] for name in ("2", "5", "10", "15", "20") if (field := found[name])]
    convs = [field.size[0] for name in ("0", "3", "6", "11", "13") if (field := found[name])]
    assert pools == [4, 10, 30, 70, 150] and convs == [3, 8, 18, 46, 62]


def test_stride_and_offset_by_hand() -> None:
    model = tiny_model(64)
    layers = enumerate_layers(model)
    found = receptive_fields(model, layers)
    # stem: 3 wide, stride 2, one pixel of padding; late: two 3 × 3 more, the last with stride 2.
    assert found["stem"] == ReceptiveField((3, 3), (2, 2), (-1, -1))
    assert found["block.0"] == ReceptiveField((7, 7), (2, 2), (-3, -3))
    assert found["late"] == ReceptiveField((11, 11), (4, 4), (-5, -5))
    assert found["head"] is None


def test_rows_and_columns_are_probed_apart_where_kernels_differ() -> None:
    model = tiny_model(64)
    assert isinstance(model.module, TinyNet)
    model.module.late = nn.Conv2d(6, 8, (1, 5), padding=(0, 2))
    late = [la for la in enumerate_layers(model) if la.name == "late"]
    assert receptive_fields(model, late)["late"] == ReceptiveField((7, 15), (2, 2), (-3, -7))


def test_folding_changes_no_layer() -> None:
    model = tiny_model()
    folded = fold(model)
    assert sum(isinstance(m, FoldedNorm) for m in folded.module.modules()) == 2
    layers = enumerate_layers(model)
    images = torch.rand(3, 3, 32, 32)
    with capture(model, layers) as a, capture(folded, layers) as b, torch.no_grad():
        before, after = a(images), b(images)
    for name in before:
        assert torch.allclose(before[name], after[name], atol=1e-5), name


def test_folding_keeps_the_taps_of_fused_norms() -> None:
    model = load_model(ModelConfig("timm", "test_efficientnet", weights=None, input_size=64))
    folded = fold(model)
    assert any(isinstance(m, FoldedNorm) for m in folded.module.modules())
    everything = enumerate_layers(model)
    assert {"bn1", "bn1.drop", "bn1.act"} <= {la.name for la in everything}
    images = torch.rand(2, 3, 64, 64)
    with capture(model, everything) as a, capture(folded, everything) as b, torch.no_grad():
        before, after = a(images), b(images)
    for name in before:
        # What the norm left behind it is an identity: inside it, `drop` sees what it saw before.
        assert torch.allclose(before[name], after[name], atol=1e-4), name


class Peeking(nn.Module):
    """Reads the convolution's output past its norm, in a way that no hook can see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        nn.init.uniform_(self.norm.running_var, 2.0, 3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return (self.norm(y) + y.abs()).mean((2, 3))


def test_folding_is_refused_where_the_convolution_is_read_elsewhere() -> None:
    model = Model(prepare_module(Peeking()), "peeking", Preprocessing((8, 8), 8, (0.5,) * 3, (0.5,) * 3), "", ())
    assert len(conv_norm_pairs(Trace(model))) == 1
    assert fold(model) is model


class OneSize(nn.Module):
    """Takes 64 × 64 pixels and no others; its last map is 4 × 4 whatever comes in."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)
        self.pool, self.fixed = nn.AdaptiveAvgPool2d(4), fixed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.fixed or x.shape[-2:] == (64, 64)
        return self.pool(self.second(self.first(x)))


@pytest.mark.parametrize("fixed", [False, True])
def test_networks_and_maps_of_one_size_are_probed_to_the_pixel(fixed: bool) -> None:
    model = Model(prepare_module(OneSize(fixed)), "one", Preprocessing((64, 64), 64, (0.5,) * 3, (0.5,) * 3), "", ())
    assert receptive_fields(model, enumerate_layers(model)) == {
        "first": ReceptiveField((3, 3), (2, 2), (-1, -1)),
        "second": ReceptiveField((7, 7), (4, 4), (-3, -3)),
        # 4 × 4 of its 16 × 16 units: 3 strides of 4 pixels more, every 16 pixels.
        "pool": ReceptiveField((19, 19), (16, 16), (-3, -3)),
    }


def test_a_field_is_found_to_be_larger_than_the_picture() -> None:
    module = prepare_module(nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=4, dilation=4) for _ in range(8))))
    model = Model(module, "wide", Preprocessing((32, 32), 32, (0.5,) * 3, (0.5,) * 3), "", ())
    assert receptive_fields(model, enumerate_layers(model))["7"] == ReceptiveField((65, 65), (1, 1), (-32, -32))


def test_what_is_looked_at_is_not_folded() -> None:
    model = tiny_model()
    layers = {la.name: la for la in enumerate_layers(model)}
    found = foldable_pairs(model)
    assert found == (("stem", "norm"), ("block.0", "block.1"))
    for name, spared in (("stem", "norm"), ("norm", "norm"), ("block.0", "block.1"), ("block.1", "block.1")):
        twin = fold(model, found, [layers[name]])
        kinds = {path: isinstance(twin.module.get_submodule(path), FoldedNorm) for _, path in found}
        assert kinds == {path: path != spared for _, path in found}
    assert not any(isinstance(m, FoldedNorm) for m in model.module.modules())
