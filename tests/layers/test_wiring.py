"""Expanded weights, against what changing one channel does to another, and against networks written by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torchvision
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.std_conv import StdConv2d
from torch import nn

from pipeline.layers.connections import NUM_CONNECTIONS, Connectivity
from pipeline.layers.connectivity import expanded_weights, find_connectivity
from pipeline.layers.finding import capture, enumerate_layers
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, prepare_module


def model_of(module: nn.Module, size: int = 16) -> Model:
    recipe = Preprocessing((size, size), size, (0.5,) * 3, (0.25,) * 3)
    return Model(prepare_module(module), "made", recipe, "0", ())


def found(module: nn.Module, names: Sequence[str] = (), deviations: dict[str, np.ndarray] | None = None):
    """Return the connections between the layers `names`, or between all convolutions and linear layers."""
    model = model_of(module)
    layers = [layer for layer in enumerate_layers(model) if layer.kind in ("conv", "linear")]
    return find_connectivity(model, [layer for layer in layers if not names or layer.name in names], deviations)


def strongest(connectivity: Connectivity, row: int) -> tuple[int, float]:
    """Return the channel and the sum of the strongest connection of a channel."""
    return int(connectivity.channel[row, 0]), float(connectivity.sum[row, 0])


def uneven(norm: nn.Module, seed: int = 3) -> nn.Module:
    """Give a batch normalization scales of both signs that differ widely, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    assert isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d) and norm.running_mean is not None
    count = norm.num_features
    with torch.no_grad():
        norm.weight.copy_(torch.randn(count, generator=generator))
        norm.bias.copy_(torch.randn(count, generator=generator))
        norm.running_mean.copy_(torch.randn(count, generator=generator))
        norm.running_var.copy_(torch.rand(count, generator=generator) * 9 + 0.05)
    return norm


def every_sum(connectivity: Connectivity, channels: int) -> np.ndarray:
    """Return the sums as a matrix, (C, channels); all channels must be among the strongest."""
    matrix = np.full((len(connectivity.channel), channels), np.nan)
    np.put_along_axis(matrix, connectivity.channel, connectivity.sum, 1)
    assert np.isfinite(matrix).all()
    return matrix


def measured_sums(module: nn.Module, source: str, target: str) -> np.ndarray:
    """Return by how much each channel of `target` rises, away from the edges, if a channel of `source` rises by 1."""
    model = model_of(module, 24)
    layers = {layer.name: layer for layer in enumerate_layers(model)}
    read, changed = layers[target], layers[source]
    rows = []
    images = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    for channel in (None, *range(changed.channels)):

        def raised(_module, args, output=None, channel=channel):
            values = (args[0] if output is None else output).clone()
            if channel is not None:
                values[:, channel] += 1
            return values

        tapped = model.module.get_submodule(changed.module)
        register = tapped.register_forward_hook if changed.side == "out" else tapped.register_forward_pre_hook
        handle = register(raised)
        with capture(model, [read]) as forward, torch.no_grad():
            maps = forward(images)[target]
        handle.remove()
        assert maps is not None
        rows.append(maps[0, :, maps.shape[2] // 2, maps.shape[3] // 2])
    return torch.stack([row - rows[0] for row in rows[1:]], 1).numpy()


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


def test_sums_are_what_a_change_of_the_source_does_to_the_reader():
    """Normalizations of both signs before, between and after, and a depthwise convolution, without a rectifier."""
    module = chain(
        nn.Conv2d(3, 6, 3, padding=1), uneven(nn.BatchNorm2d(6), 1),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), uneven(nn.BatchNorm2d(6), 2),
        nn.Dropout(), uneven(nn.BatchNorm2d(6), 4), nn.Conv2d(6, 5, 3, padding=1), uneven(nn.BatchNorm2d(5), 3),
    )  # fmt: skip
    inputs, outputs = found(module, ["0", "6"])
    measured = measured_sums(module, "0", "6")
    assert np.allclose(every_sum(inputs["6"], 6), measured, rtol=1e-3, atol=1e-4)
    assert np.allclose(every_sum(outputs["0"], 5).T, measured, rtol=1e-3, atol=1e-4)
    assert (measured < 0).any() and (measured > 0).any() and inputs["6"].approximate == ()


def test_fused_normalizations_of_timm_are_included():
    module = chain(
        nn.Conv2d(3, 6, 1), uneven(BatchNormAct2d(6, apply_act=False), 1),
        nn.Conv2d(6, 5, 3, padding=1), uneven(BatchNormAct2d(5, apply_act=False), 2),
    )  # fmt: skip
    inputs, _ = found(module)
    assert np.allclose(every_sum(inputs["2"], 6), measured_sums(module, "0", "2"), rtol=1e-3, atol=1e-4)


def test_a_normalization_decides_which_connection_is_the_strongest():
    module = chain(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2))
    before, conv, after = module[2], module[3], module[4]
    assert isinstance(before, nn.BatchNorm2d) and isinstance(after, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[3.0, 2.0, 1.0], [6.0, 1.0, 1.0]])[..., None, None])
        before.weight[2] = 10  # channel 2 arrives ten times as strong
        before.weight[1] = -1  # and channel 1 with the other sign
        assert after.running_var is not None
        after.running_var[1] = 100 - after.eps  # channel 1 is read at a tenth
    inputs, outputs = found(module)
    # By the plain weights it would be channel 0 for both readers, and reader 1 for channel 0.
    assert strongest(inputs["3"], 0) == (2, pytest.approx(10, rel=1e-4))
    assert inputs["3"].channel[0].tolist() == [2, 0, 1] and inputs["3"].sum[0, 2] == pytest.approx(-2, rel=1e-4)
    assert strongest(inputs["3"], 1) == (2, pytest.approx(1, rel=1e-4))
    assert strongest(outputs["0"], 0) == (0, pytest.approx(3, rel=1e-4))


def test_the_sources_own_normalization_is_in_its_values_already():
    module = chain(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1))
    norm, conv = module[1], module[3]
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        norm.weight[1] = 1000
        conv.weight.copy_(torch.tensor([[2.0, 1.0]])[..., None, None])
    assert strongest(found(module)[0]["3"], 0) == (0, 2.0)


def test_a_depthwise_kernel_of_negative_sum_turns_the_sign():
    module = chain(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 3, groups=2, padding=1), nn.ReLU(), nn.Conv2d(2, 1, 1))
    depthwise, conv = module[1], module[3]
    assert isinstance(depthwise, nn.Conv2d) and isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        depthwise.weight[0] = -1 / 9
        depthwise.weight[1] = 1 / 9
        conv.weight.copy_(torch.tensor([[2.0, 1.0]])[..., None, None])
    inputs, outputs = found(module, ["0", "3"])
    assert inputs["3"].channel[0].tolist() == [0, 1]
    assert np.allclose(inputs["3"].sum[0], [-2, 1]) and np.allclose(inputs["3"].norm[0], [2 / 3, 1 / 3])
    assert outputs["0"].sum[0, 0] == pytest.approx(-2)


def test_a_source_that_hardly_varies_falls_behind():
    module = chain(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    conv = module[2]
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[-4.0, 3.0, 2.0], [-4.0, 2.0, 3.0]])[..., None, None])
    inputs, outputs = found(module)
    assert inputs["2"].channel.tolist() == [[0, 1, 2], [0, 2, 1]] and inputs["2"].scale == "1"
    assert np.array_equal(inputs["2"].strength, inputs["2"].norm)
    inputs, outputs = found(module, deviations={"0": np.array([0.0, 1.0, 2.0]), "2": np.ones(2)})
    # A channel that never varies acts on nothing; the weights themselves are stored without the scale.
    assert inputs["2"].channel.tolist() == [[2, 1, -1], [2, 1, -1]] and inputs["2"].scale == "sd"
    assert inputs["2"].strength.tolist() == [[4, 3, 0], [6, 2, 0]] and inputs["2"].norm[0].tolist() == [2, 3, 4]
    assert outputs["0"].channel.tolist() == [[-1, -1], [0, 1], [1, 0]] and outputs["0"].scale == "sd"
    unknown, _ = found(module, deviations={"0": np.array([np.nan, 1.0, np.inf]), "2": np.ones(2)})
    assert unknown["2"].channel[0].tolist() == [1, -1, -1]


def test_normalizations_of_flattened_maps_count_for_each_position():
    module = chain(nn.Conv2d(3, 2, 8, stride=8), nn.Flatten(), uneven(nn.BatchNorm1d(8)), nn.Linear(8, 3, bias=False))
    norm, head = module[2], module[3]
    assert isinstance(norm, nn.BatchNorm1d) and isinstance(head, nn.Linear) and norm.running_var is not None
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    expected = (head.weight * gain).reshape(3, 2, 4).sum(2).detach().numpy()
    inputs, _ = found(module)
    assert np.allclose(every_sum(inputs["3"], 2), expected, rtol=1e-4, atol=1e-6)


def test_normalizations_by_each_image_are_named_and_their_gain_counts():
    module = chain(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    norm, conv = module[2], module[3]
    assert isinstance(norm, nn.GroupNorm) and isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        norm.weight[3] = -100
    inputs, outputs = found(module)
    assert inputs["3"].approximate == outputs["0"].approximate == ("2",)
    channel, total = strongest(inputs["3"], 0)
    assert channel == 3 and total == pytest.approx(-100 * float(conv.weight[0, 3]), rel=1e-3)
    module[3] = StdConv2d(4, 2, 1)  # standardizes its weights in the forward pass
    assert found(module)[0]["3"].approximate == ("2", "3")


def test_frozen_and_exported_normalizations_have_the_same_scale():
    module = chain(nn.Conv2d(3, 6, 1), nn.ReLU(), uneven(nn.BatchNorm2d(6, eps=0.01)), nn.Conv2d(6, 5, 1)).eval()
    expected, conv = every_sum(found(module)[0]["3"], 6), module[3]
    assert isinstance(conv, nn.Conv2d) and not np.allclose(expected, conv.weight.detach()[..., 0, 0], rtol=0.1)
    images = (torch.rand(2, 3, 16, 16),)
    program = torch.export.export(module, images, dynamic_shapes=({0: torch.export.Dim("batch")},))
    inputs, _ = found(torch.export.unflatten(program))
    assert np.allclose(every_sum(inputs["3"], 6), expected, rtol=1e-4) and inputs["3"].approximate == ()
    frozen = torchvision.ops.FrozenBatchNorm2d(6, eps=0.01)
    frozen.load_state_dict({k: v for k, v in module[2].state_dict().items() if k != "num_batches_tracked"})
    inputs, _ = found(nn.Sequential(module[0], module[1], frozen, module[3]))
    assert np.allclose(every_sum(inputs["3"], 6), expected, rtol=1e-4) and inputs["3"].approximate == ()


def test_blocks_named_after_their_normalization_are_no_normalization():
    """Torchvision's Conv2dNormActivation mixes channels: the layer before it does not feed the layer after it."""
    block = torchvision.ops.Conv2dNormActivation
    module = chain(block(3, 4, 1), nn.Sequential(block(4, 8, 1), nn.Conv2d(8, 4, 1)))
    inputs, _ = found(module)
    assert {name: wired.layer for name, wired in inputs.items()} == {"1.0.0": "0.0", "1.1": "1.0.0"}
    assert not found(module, ["0.0", "1.1"])[0]


def test_only_linear_layers_read_flattened_maps():
    assert expanded_weights(nn.Conv2d(8, 2, 1), 4) is None and expanded_weights(nn.Linear(8, 2), 4) is not None
