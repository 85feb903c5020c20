"""Layers whose values have a zero that means something, in networks where it is known."""

import pytest
import torch
from conftest import compose
from torch import Tensor, nn
from torch.nn import functional

from pipeline.layers import selection
from pipeline.layers.finding import enumerate_layers
from pipeline.models.config import ModelConfig, Preprocessing
from pipeline.models.loading import Model, load_model


class Block(nn.Module):
    """A residual block; with `after`, a rectifier follows the sum."""

    def __init__(self, after: str = "", inplace: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.after, self.inplace = after, inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        if self.inplace:
            y += x  # the same tensor object, with other values
        else:
            y = y + x
        return functional.relu(y, inplace=self.inplace) if self.after else y


class Gate(nn.Module):
    """Squeeze and excitation: multiplies by a number between 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(8, 4, 1)
        self.expand = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(functional.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class Branches(nn.Module):
    """One branch is rectified by a function, in place; the other is as given."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 4, 1), nn.Sequential(nn.Conv2d(8, 4, 1), second)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([functional.relu_(self.first(x)), self.second(x)], 1)


def rectified(module: nn.Module) -> dict[str, bool]:
    """Return `Layer.rectified` by layer name."""
    torch.manual_seed(0)
    size = Preprocessing((32, 32), 32, (0.5,) * 3, (0.5,) * 3)
    return {layer.name: layer.rectified for layer in enumerate_layers(Model(module.eval(), "made", size, "0", ()))}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_residual_sum_has_no_zero_unless_a_rectifier_follows(inplace: bool) -> None:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(inplace))
    found = rectified(nn.Sequential(stem, Block(inplace=inplace), Block("relu", inplace), nn.Conv2d(8, 2, 1)))
    # The rectifier reads the sum, not the output of the convolution.
    for name, expected in (("0.0", True), ("0.1", True), ("1.conv", False), ("1", False), ("2.conv", False)):
        assert found[name] is expected, name
    assert found["2"] and not found["3"]


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (nn.ReLU(), True),
        (nn.Hardtanh(0, 4), True),
        (nn.Hardtanh(), False),
        (nn.LeakyReLU(0.1), True),
        (nn.PReLU(), True),
        (nn.ELU(), True),
        (nn.SELU(), True),
        (nn.SiLU(inplace=True), True),
        (nn.GELU(), True),
        (nn.Mish(), True),
        (nn.Hardswish(), True),
        (nn.Softplus(), True),
        (nn.Threshold(1.0, 1.0), False),
        (nn.Sigmoid(), False),
        (nn.Tanh(), False),
        (nn.Identity(), False),
    ],
)
def test_which_activations_give_the_layer_before_them_a_zero(activation: nn.Module, expected: bool) -> None:
    found = rectified(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation, nn.Conv2d(8, 4, 3)))
    assert found["0"] is expected and not found["3"]
    if not isinstance(activation, nn.Identity):
        # A sigmoid is never negative, though the layer before it has no zero.
        assert found["2"] is (expected or isinstance(activation, nn.Sigmoid))


def test_zero_survives_pooling_gates_and_concatenation() -> None:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    found = rectified(nn.Sequential(stem, Gate(), Branches(nn.ReLU()), Branches(nn.Identity()), *tail))
    assert found["0.2"] and found["1"] and found["1.reduce"] and not found["1.expand"]
    assert found["2.first"] and found["2.second.0"] and found["2"]
    assert found["3.first"] and not found["3.second.0"] and not found["3"] and not found["4"] and not found["6"]
    whole = rectified(nn.Sequential(stem, Branches(nn.ReLU()), *tail))
    assert whole["2"] and not whole["4"]


def test_a_normalization_between_convolution_and_rectifier_moves_the_zero() -> None:
    """Pre-activation: the sum is normalized before the rectifier, so the zero of the sum itself means nothing."""

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(functional.relu(self.bn(x)))

    found = rectified(nn.Sequential(nn.Conv2d(3, 8, 3), PreActivation(), PreActivation()))
    assert found["1.bn"] and not found["1.conv"] and not found["1"] and not found["2"]


def test_an_operation_that_cannot_be_observed_does_not_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Unobservable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if torch.utils._python_dispatch._len_torch_dispatch_stack():
                raise NotImplementedError("no rule for this mode")
            return x.relu()

    found = rectified(nn.Sequential(nn.Conv2d(3, 8, 3), Unobservable()))
    assert not any(found.values()) and "no rule for this mode" in caplog.text


def test_the_default_tour_shows_layers_beside_a_rectifier_and_the_logits() -> None:
    model = load_model(ModelConfig("package", "efficientnet_lite0")).to("cpu")
    config = compose([]).config.layers
    layers = selection.select_layers(model, selection.list_layers(model, config), config)
    assert [layer.name for layer in layers if not layer.rectified] == ["classifier"]
    assert len(layers) == 9 and "blocks.4.2.conv_pw" in [layer.name for layer in layers]
    # A depthwise convolution is taken where a block has no other layer beside a rectifier.
    listed = selection.list_layers(model, config)
    block = next(layer for layer in selection.select_layers(model, listed, compose(["layers=blocks"]).config.layers)
                 if layer.module == "blocks.0.0")  # fmt: skip
    taken = selection._layer_with_units(listed, block)
    assert taken is not None and taken.name == "blocks.0.0.conv_dw"
