"""What layers read: residual sums, branches and values that pass through functions."""

import pytest
import torch
from torch import nn

from pipeline.layers.dataflow import IMAGE, find_dataflow
from pipeline.layers.finding import enumerate_layers
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, prepare_module


class Branched(nn.Module):
    """Two branches that are concatenated, a squeeze-and-excite gate, and a layer behind that changes it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.three, self.gate, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu_()
        x = torch.cat([self.one(x), self.three(self.two(x)).clamp_(min=0)], 1)
        return self.last(x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid())


def model_of(module: nn.Module) -> Model:
    return Model(prepare_module(module), "made", Preprocessing((16, 16), 16, (0.5,) * 3, (0.25,) * 3), "", ())


def test_branches_and_gates_are_joins():
    model = model_of(Branched())
    layers = list(enumerate_layers(model))
    assert [layer.name for layer in layers] == ["stem", "one", "two", "three", "gate", "last"]
    flow = find_dataflow(model, layers)
    assert flow is not None
    assert flow.sources == (IMAGE, 0, 0, 2, 6, 7)
    assert flow.joins == ((1, 3), (6, 4))


def test_a_residual_sum_is_a_join(tiny, tiny_layers):
    names = ["stem", "block.0", "late", "head"]
    flow = find_dataflow(tiny, [tiny_layers[name] for name in names])
    assert flow is not None
    # The block has one convolution, whose output the value of the stem is added to.
    assert flow.sources == (IMAGE, 0, 4, 2) and flow.joins == ((0, 1),)


def test_a_network_that_cannot_be_observed_has_no_flow(tiny, tiny_layers, monkeypatch):
    monkeypatch.setattr("pipeline.layers.dataflow._Observer._joined", lambda *_: 1 / 0)
    assert find_dataflow(tiny, list(tiny_layers.values())) is None


@pytest.mark.long
def test_the_branches_of_googlenet():
    torchvision = pytest.importorskip("torchvision")
    model = model_of(torchvision.models.googlenet(weights=None, init_weights=False).eval())
    model = Model(model.module, "googlenet", Preprocessing((64, 64), 64, (0.5,) * 3, (0.25,) * 3), "", ())
    layers = [layer for layer in enumerate_layers(model) if layer.kind in ("conv", "linear")]
    flow = find_dataflow(model, layers)
    assert flow is not None and len(flow.joins) == 9 and all(len(join) == 4 for join in flow.joins)
