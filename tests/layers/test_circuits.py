"""Linear paths and kernels, against networks written by hand and against what changing one channel does to another."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from test_wiring import chain, every_sum, measured_sums, model_of, uneven
from torch import nn
from torch.nn import functional

from pipeline.layers.circuits.linearized import mean_gate
from pipeline.layers.circuits.search import find_circuits
from pipeline.layers.connections import Connectivity
from pipeline.layers.finding import enumerate_layers


def circuits(module: nn.Module, names: Sequence[str], size: int = 24, channels: Sequence[int] | None = None):
    """Return the connections between the layers `names`, all channels unless others are given."""
    model = model_of(module, size)
    layers = {layer.name: layer for layer in enumerate_layers(model)}
    return find_circuits(model, [(layers[name], channels or range(layers[name].channels)) for name in names])


def kernel_of(connectivity: Connectivity, row: int, channel: int) -> np.ndarray:
    """Return the kernel between a channel and a channel of the other layer."""
    assert connectivity.kernel is not None
    return connectivity.kernel[row, connectivity.channel[row].tolist().index(channel)].astype(np.float32)


class Block(nn.Module):
    """1 × 1, depthwise and 1 × 1 convolution without activation functions, with a residual path around them."""

    def __init__(self, residual: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 4, 1)
            self.expand = nn.Conv2d(4, 6, 1, bias=False)
            self.norm = uneven(nn.BatchNorm2d(6), 2)
            self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
            self.project = nn.Conv2d(6, 4, 1)
            self.reader = nn.Conv2d(4, 5, 1)
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.project(self.depthwise(self.norm(self.expand(x))))
        return self.reader(x + y if self.residual else y)


def test_convolutions_between_are_multiplied_out():
    module = Block(residual=False)
    inputs, outputs = circuits(module, ["stem", "reader"])
    found = inputs["reader"]
    assert found.layer == "stem" and found.linearized and found.path == ("expand", "depthwise", "project")
    assert found.bypassed == () and found.residual is None and outputs["stem"].layer == "reader"
    gain = module.norm.weight / (module.norm.running_var + module.norm.eps).sqrt()
    back = (module.reader.weight[..., 0, 0] @ module.project.weight[..., 0, 0])[:, :, None] * module.depthwise.weight[
        :, 0
    ].flatten(1)
    expected = (
        torch.einsum("omk,m,mi->oik", back, gain, module.expand.weight[..., 0, 0]).detach().reshape(5, 4, 3, 3).numpy()
    )
    assert np.allclose(every_sum(found, 4), expected.sum((2, 3)), rtol=1e-3, atol=1e-5)
    for row in range(5):
        for channel in range(4):
            assert np.allclose(kernel_of(found, row, channel), expected[row, channel], rtol=2e-3, atol=1e-4)
    norms = np.linalg.norm(expected.reshape(5, 4, 9), axis=2)
    assert np.allclose(found.norm, -np.sort(-norms, axis=1), rtol=1e-3)
    assert np.allclose(every_sum(outputs["stem"], 5).T, every_sum(found, 4), rtol=1e-4)
    assert np.allclose(kernel_of(outputs["stem"], 1, 3), kernel_of(found, 3, 1))


def test_a_residual_path_is_named_and_its_part_is_stored():
    module = Block()
    found = circuits(module, ["stem", "reader"])[0]["reader"]
    assert found.path == found.bypassed == ("expand", "depthwise", "project")
    assert np.allclose(every_sum(found, 4), measured_sums(module, "stem", "reader"), rtol=1e-3, atol=1e-4)
    assert found.residual is not None
    part = np.take_along_axis(module.reader.weight.detach()[..., 0, 0].numpy(), found.channel, 1)
    assert np.allclose(found.residual, part, rtol=1e-4, atol=1e-6)
    assert not np.allclose(found.residual, found.sum, rtol=0.1)


def test_strides_and_groups_are_in_the_kernel():
    module = chain(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1),
    )  # fmt: skip
    found = circuits(module, ["0", "2"])[0]["2"]
    assert found.kernel is not None and found.kernel.shape == (4, 4, 7, 7)
    first, second = module[1].weight.detach(), module[2].weight.detach()
    expected = torch.zeros(7, 7)
    for middle in (2, 3):  # input 3 belongs to the second group
        for y in range(3):
            for x in range(3):
                expected[2 * y : 2 * y + 3, 2 * x : 2 * x + 3] += second[1, middle, y, x] * first[middle, 1]
    assert np.allclose(kernel_of(found, 1, 3), expected.numpy(), rtol=2e-3, atol=1e-4)


def test_kernels_of_direct_neighbours():
    module = chain(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), uneven(nn.BatchNorm2d(4)), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False), uneven(nn.BatchNorm2d(4), 2),
    )  # fmt: skip
    inputs, outputs = circuits(module, ["0", "4"])
    found = inputs["4"]
    assert not found.linearized and found.path == ("1",) and found.kernel is not None
    assert found.kernel.shape == (4, 4, 5, 5)
    before, after = ((n.weight / (n.running_var + n.eps).sqrt()).detach() for n in (module[2], module[5]))
    small, large = module[1].weight.detach()[2, 0] * before[2], module[4].weight.detach()[3, 2] * after[3]
    expected = functional.conv_transpose2d(large[None, None], small[None, None])[0, 0]
    assert np.allclose(kernel_of(found, 3, 2), expected.numpy(), rtol=2e-3, atol=1e-4)
    assert np.allclose(kernel_of(outputs["0"], 2, 3), expected.numpy(), rtol=2e-3, atol=1e-4)
    assert np.allclose(found.kernel.astype(np.float32).sum((2, 3)), found.sum, rtol=1e-2, atol=1e-3)


def test_the_former_measure_had_the_wrong_sign():
    """The weight of a 1 × 1 convolution was multiplied by the norm of the depthwise kernel before it."""
    module = chain(
        nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 3, groups=2, padding=1, bias=False), nn.Conv2d(2, 3, 1), nn.Conv2d(3, 1, 1)
    )
    with torch.no_grad():
        module[1].weight.copy_(torch.stack([-torch.ones(1, 3, 3) / 9, torch.ones(1, 3, 3) / 9]))
        module[2].weight.fill_(1)
        module[3].weight.fill_(1)
    found = circuits(module, ["0", "3"])[0]["3"]
    assert every_sum(found, 2)[0] == pytest.approx([-3, 3], rel=1e-4)
    assert (kernel_of(found, 0, 0) < 0).all() and (kernel_of(found, 0, 1) > 0).all()


def test_large_kernels_are_cropped_to_their_middle():
    module = chain(nn.Conv2d(3, 2, 1), *(nn.Conv2d(2, 2, 5, padding=2) for _ in range(3)))
    found = circuits(module, ["0", "3"])[0]["3"]
    assert found.kernel is not None and found.kernel.shape[2:] == (9, 9)
    # The norms and sums are those of the complete kernels, 13 × 13.
    assert np.allclose(every_sum(found, 2), measured_sums(module, "0", "3"), rtol=1e-3, atol=1e-5)


def test_activation_functions_between_have_their_mean_gate():
    """Half of the values of a normalization without bias pass a ReLU, all of those with a large one, none below."""
    module = chain(
        nn.Conv2d(3, 3, 1),
        nn.Conv2d(3, 3, 1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 2, 1),
        nn.Conv2d(2, 2, 1),
    )
    norm = module[2]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([0.0, 50.0, -50.0]))
        module[1].weight.copy_(torch.eye(3)[..., None, None])
    found = circuits(module, ["0", "5"])[0]["5"]
    assert found.gated == ("3",)
    product = (module[5].weight[..., 0, 0] @ module[4].weight[..., 0, 0]).detach().numpy()
    expected = product * [0.5, 1, 0] / np.sqrt(1 + norm.eps)
    assert sorted(found.channel[0].tolist()) == [-1, 0, 1]
    for row, k in np.argwhere(found.channel >= 0).tolist():
        assert found.sum[row, k] == pytest.approx(float(expected[row, found.channel[row, k]]), rel=1e-2)


def test_mean_gates_are_means_of_the_slope():
    draws = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, deviation = torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([2.0, 0.3], dtype=torch.float64)
    for function in (torch.relu, functional.relu6, functional.silu, functional.gelu):
        z = (mean + deviation * draws).requires_grad_()
        (slope,) = torch.autograd.grad(function(z).sum(), z)
        assert torch.allclose(mean_gate(function, mean, deviation), slope.mean(0), atol=4e-3), function


def test_only_channels_of_the_atlas_are_targets():
    inputs, outputs = circuits(Block(), ["stem", "reader"], channels=[1, 3])
    assert (inputs["reader"].channel[[1, 3]] >= 0).all() and (inputs["reader"].channel[[0, 2, 4]] == -1).all()
    assert set(outputs["stem"].channel.ravel().tolist()) == {1, 3}


def test_parallel_branches_read_the_layer_before_both():
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.merge, self.reader = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.reader(self.merge(torch.cat([self.left(x), self.right(x)], 1)))

    inputs, _ = circuits(Parallel(), ["stem", "left", "right", "reader"])
    assert {name: one.layer for name, one in inputs.items()} == {"left": "stem", "right": "stem", "reader": "right"}


def test_attention_has_no_linear_path():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.reader = nn.Conv2d(3, 4, 4, stride=4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            tokens = x.flatten(2)
            mixed = tokens @ (tokens.transpose(1, 2) @ tokens).softmax(-1)
            return self.reader(mixed.reshape(x.shape))

    assert circuits(Attention(), ["stem", "reader"]) == ({}, {})


def test_gates_of_squeeze_and_excitation_are_constants():
    class Excited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.gate, self.reader = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1, bias=False)
            self.sigmoid = nn.Sigmoid()
            nn.init.zeros_(self.gate.weight), nn.init.zeros_(self.gate.bias)

        def forward(self, x):
            x = self.stem(x)
            return self.reader(x * self.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))

    module = Excited()
    found = circuits(module, ["stem", "reader"])[0]["reader"]
    assert "sigmoid" not in found.path
    assert np.allclose(every_sum(found, 3), module.reader.weight.detach()[..., 0, 0] / 2, rtol=1e-3)
