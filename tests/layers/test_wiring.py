"""Expanded weights, against what changing one channel does to another, and against networks written by hand."""

import numpy as np
import torch
from torch import nn

from pipeline.layers.connectivity import NUM_CONNECTIONS, expanded_weights, find_connectivity
from pipeline.layers.finding import enumerate_layers
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, prepare_module


def model_of(module: nn.Module, size: int = 16) -> Model:
    recipe = Preprocessing((size, size), size, (0.5,) * 3, (0.25,) * 3)
    return Model(prepare_module(module), "made", recipe, "0", ())


def found(module: nn.Module):
    model = model_of(module)
    layers = [layer for layer in enumerate_layers(model) if layer.kind in ("conv", "linear")]
    return find_connectivity(model, layers)


def chain(*parts: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*parts)


def test_expanded_weights_are_the_kernels():
    conv = nn.Conv2d(4, 6, 3)
    norm, total = expanded_weights(conv, 4) or (None, None)
    assert norm is not None and total is not None and norm.shape == (6, 4)
    kernel = conv.weight.detach()[5, 2]
    assert np.isclose(norm[5, 2], kernel.norm()) and np.isclose(total[5, 2], kernel.sum())


def test_groups_that_do_not_meet_are_zero():
    conv = nn.Conv2d(4, 8, 3, groups=2)
    norm, _ = expanded_weights(conv, 4) or (np.ones(1), None)
    assert (norm[:4, :2] > 0).all() and (norm[:4, 2:] == 0).all() and (norm[4:, :2] == 0).all()


def test_flattened_maps_are_put_together_by_channel():
    head = nn.Linear(3 * 4, 2)
    norm, total = expanded_weights(head, 3) or (None, None)
    assert norm is not None and total is not None
    assert np.allclose(total, head.weight.detach().reshape(2, 3, 4).sum(2).numpy())
    assert expanded_weights(head, 5) is None and expanded_weights(nn.ReLU(), 5) is None


def test_strongest_units_through_norm_activation_and_pool():
    module = chain(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 10, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4),
    )  # fmt: skip
    inputs, outputs = found(module)
    assert {name: w.layer for name, w in inputs.items()} == {"4": "0", "8": "4"}
    assert {name: w.layer for name, w in outputs.items()} == {"0": "4", "4": "8"}
    weight = module[4].weight.detach()
    expected = weight.flatten(2).norm(dim=2)[7].argsort(descending=True, stable=True)[:NUM_CONNECTIONS]
    assert inputs["4"].channel[7].tolist() == expected.tolist()
    assert inputs["4"].norm[7, 0] == weight[7, expected[0]].norm()
    assert np.isclose(inputs["4"].sum[7, 0], weight[7, expected[0]].sum())
    back = weight.flatten(2).norm(dim=2)[:, 3].argsort(descending=True, stable=True)[:NUM_CONNECTIONS]
    assert outputs["0"].channel[3].tolist() == back.tolist()
    assert outputs["4"].channel.shape == (10, 4)


def test_sums_and_unknown_functions_end_the_way():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x):
            y = self.two(self.one(x))
            return self.three(x + y)

    inputs, _ = found(Residual())
    assert list(inputs) == ["two"]


def test_depthwise_convolutions_that_are_no_layers_are_multiplied_through():
    module = chain(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 5, 3, groups=5, padding=1), nn.Conv2d(5, 4, 1))
    model = model_of(module)
    layers = [layer for layer in enumerate_layers(model) if layer.name in ("0", "2")]
    inputs, _ = find_connectivity(model, layers)
    by = module[1].weight.detach().flatten(1).norm(dim=1)
    expected = module[2].weight.detach()[..., 0, 0].abs() * by
    assert np.allclose(inputs["2"].norm, np.sort(expected.numpy())[:, ::-1])


def test_silence_is_wired_to_nothing():
    module = chain(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        module[1].weight[0] = 0
    inputs, _ = found(module)
    assert (inputs["1"].channel[0] == -1).all() and (inputs["1"].channel[1] >= 0).all()
