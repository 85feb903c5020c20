"""A lowered network is the folded one to rounding, in values and gradients, and nobody's weights change."""

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from conftest import compose
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from pipeline.acceleration import cpu_lowering
from pipeline.acceleration.batchnorm_folding import FoldedNorm, fold, foldable_pairs
from pipeline.acceleration.cpu_lowering import Depthwise, FirstConv, LoweredConv2d, Pointwise, lower
from pipeline.acceleration.redirected_relu import limits_of, redirected
from pipeline.engine import worker
from pipeline.engine.worker import Worker
from pipeline.layers.finding import Layer, capture, enumerate_layers
from pipeline.models.loading import Model, ModelConfig, load_model
from pipeline.planning.folder import RunFolder
from pipeline.planning.planner import Plan, make_plan
from pipeline.runs.maintenance import verify
from pipeline.runs.runner import run
from pipeline.visualization.loop import render
from pipeline.visualization.render_job import RenderJob

ACTS = {"none": nn.Identity(), "relu": nn.ReLU(), "relu6": nn.ReLU6()}


def gradients(module: nn.Module, x: torch.Tensor, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out, and the gradient of its sum weighted by noise."""
    x = x.clone().requires_grad_(True)
    y = module(x)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) if weights is None else weights
    return y.detach(), torch.autograd.grad((y * noise).sum(), x)[0]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from([Depthwise, Pointwise, FirstConv]),
    same=st.booleans(),
    act=st.sampled_from(sorted(ACTS)),
    bias=st.booleans(),
    last=st.booleans(),
    fusing=st.booleans(),
)
def test_any_lowered_convolution_is_the_convolution(
    data: st.DataObject, kind: type[LoweredConv2d], same: bool, act: str, bias: bool, last: bool, fusing: bool
) -> None:
    """Also where this PyTorch has no rectifiers inside oneDNN's convolutions."""
    channels = data.draw(st.integers(2, 4 if kind is FirstConv else 20))
    x = torch.rand(2, channels, *(data.draw(st.integers(7, 14)) for _ in range(2)))
    if kind is not Pointwise:
        out, groups = (channels, channels) if kind is Depthwise else (data.draw(st.integers(1, 6)), 1)
        kernel, stride = (data.draw(st.tuples(*2 * [st.integers(1, most)])) for most in (5, 3))
        if same:
            conv: Any = Conv2dSame(channels, out, kernel, stride, groups=groups, bias=bias)
        else:
            most = 1 if kind is FirstConv else 2
            dilation = data.draw(st.tuples(*(st.integers(1, most if k < 4 else 1) for k in kernel)))
            padding = data.draw(
                st.tuples(*(st.integers(0, d * (k - 1)) for k, d in zip(kernel, dilation, strict=True)))
            )
            conv = nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias)
    else:
        conv = nn.Conv2d(channels, data.draw(st.integers(1, 6)), 1, bias=bias)
    found = cpu_lowering._replacement_class(conv)
    # A kernel of one place and stride is a matrix product, whatever its channels.
    assert found is kind or (kind is FirstConv and found is Pointwise and conv.kernel_size == conv.stride == (1, 1))
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    lowered = found(conv, limits_of(ACTS[act]))
    wanted = gradients(nn.Sequential(conv, ACTS[act]), x, None)
    there = cpu_lowering._can_fuse_rectifier(x.dtype)
    with mock.patch.object(cpu_lowering, "_can_fuse_rectifier", lambda _: fusing and there):
        torch.testing.assert_close(gradients(lowered, x, None), wanted, rtol=1e-4, atol=1e-5)
    lowered.redirecting = True
    torch.testing.assert_close(lowered(x), wanted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv2d(5, 4, 1, stride=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding=3),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding="same", groups=4),
        nn.Conv2d(4, 4, 1, padding=1),
        Conv2dSame(4, 4, 3, dilation=2, groups=4),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        nn.ConvTranspose2d(4, 4, 1),
        nn.Linear(4, 4),
    ],
    ids=str,
)
def test_what_is_not_known_to_be_faster_stays(conv: nn.Module) -> None:
    assert cpu_lowering._replacement_class(conv) is None


@pytest.fixture(scope="module")
def network() -> Model:
    """1 x 1 and depthwise convolutions with rectifiers, and uneven padding; random, but not idle."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = load_model(ModelConfig("timm", "tf_efficientnet_lite0", weights=None, input_size=64))
        for norm in (m for m in model.module.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, 0.0, 0.5)
    return model


@pytest.fixture(scope="module")
def layers(network: Model) -> dict[str, Layer]:
    return {layer.name: layer for layer in enumerate_layers(network)}


@pytest.mark.parametrize("name", ["blocks.1.1", "blocks.2.0.conv_dw", "blocks.4.0.conv_pw", "conv_head"])
def test_a_lowered_network_is_the_folded_one(network: Model, layers: dict[str, Layer], name: str) -> None:
    """Also at an odd size, and where a tapped layer's own pair is spared."""
    pairs, layer = foldable_pairs(network), layers[name]
    before = copy.deepcopy(network.module.state_dict())
    folded = fold(network, pairs, [layer])
    seen = {}
    images = torch.rand(2, 3, 97, 64, generator=torch.Generator().manual_seed(0))
    for key, model in {
        "folded": folded, "float32": lower(folded, pairs), "bfloat16": lower(folded, pairs, torch.bfloat16)
    }.items():  # fmt: skip
        x = images.clone().requires_grad_(True)
        with capture(model, [layer]) as forward:
            maps = forward(x)[name].float()
        seen[key] = maps.detach(), torch.autograd.grad(maps[:, 1].sum(), x)[0]
    for mine, theirs in zip(seen["float32"], seen["folded"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    # Random weights pass gradients through 60 layers worse than learnt ones do (0.93 at the real network's end).
    for mine, theirs, least in zip(seen["bfloat16"], seen["folded"], (0.9, 0.7), strict=True):
        alike = torch.nn.functional.cosine_similarity(mine.flatten(), theirs.flatten(), 0)
        assert alike > least, f"{alike}"
    after = network.module.state_dict()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert all(p.dtype == torch.float32 for p in folded.module.parameters())


def test_rectifiers_of_folded_norms_work_where_the_convolution_wrote(network: Model) -> None:
    pairs = foldable_pairs(network)
    lowered = lower(fold(network, pairs), pairs)
    kinds = [m for m in lowered.module.modules() if isinstance(m, LoweredConv2d)]
    held = [m for m in kinds if m.limits == (0.0, 6.0)]
    # Each block has two rectifiers (the first one), and the head has one.
    assert len(kinds) > 40 and len(held) > 30
    norms = [m for m in lowered.module.modules() if isinstance(m, FoldedNorm)]
    assert norms and not any(isinstance(m.act, nn.ReLU6) for m in norms)
    assert sum(isinstance(m, FirstConv) for m in kinds) == 1  # the stem


def broken(*_: object) -> torch.Tensor:
    raise RuntimeError("expected at most 5 arguments")


@pytest.mark.parametrize(
    ("operators", "reason"),
    [
        (SimpleNamespace(), "no attribute '_is_mkldnn_bf16_supported'"),
        (SimpleNamespace(_is_mkldnn_bf16_supported=lambda: False), "no attribute '_linear_pointwise'"),
        (
            SimpleNamespace(_is_mkldnn_bf16_supported=lambda: False, _linear_pointwise=broken),
            "expected at most 5 arguments",
        ),
        (
            SimpleNamespace(_is_mkldnn_bf16_supported=lambda: False, _linear_pointwise=lambda x, *_: x),
            "not close",  # a rectifier that is not applied
        ),
    ],
    ids=["no operators", "one missing", "another signature", "another meaning"],
)
def test_without_fused_operators_the_plain_ones_run(
    operators: SimpleNamespace, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    layers = [Pointwise(nn.Conv2d(4, 6, 1), (0.0, None)), Depthwise(nn.Conv2d(4, 4, 3, groups=4), (0.0, 6.0))]
    expected = [layer(x) for layer in layers]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    cpu_lowering._fusing_types.cache_clear()
    try:
        for _ in range(2):
            for layer, y in zip(layers, expected, strict=True):
                torch.testing.assert_close(layer(x), y)
    finally:
        cpu_lowering._fusing_types.cache_clear()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and reason in record.getMessage()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
def test_fused_operators_work_in_the_installed_version() -> None:
    assert torch.float32 in cpu_lowering._fusing_types()


def test_dead_units_find_a_way_through_lowered_rectifiers() -> None:
    conv = nn.Conv2d(1, 1, 1)
    conv.load_state_dict({"weight": torch.ones(1, 1, 1, 1), "bias": torch.full((1,), -2.0)})
    lowered = Pointwise(conv, (0.0, 6.0))
    x = torch.full((1, 1, 2, 2), 0.5)
    assert gradients(lowered, x, torch.ones(1, 1, 2, 2))[1].abs().sum() == 0
    with redirected(lowered):
        assert (gradients(lowered, x, torch.ones(1, 1, 2, 2))[1] > 0).all()
    assert gradients(lowered, x, torch.ones(1, 1, 2, 2))[1].abs().sum() == 0


@pytest.mark.long
def test_pictures_of_bfloat16_steps_are_measured_in_float32(network: Model, layers: dict[str, Layer]) -> None:
    """Their numbers are the folded network's, and they reach what float32 reaches, alone and in a batch."""
    pairs, layer = foldable_pairs(network), layers["blocks.2.1"]
    folded = fold(network, pairs, [layer])
    lowered = lower(folded, pairs, torch.bfloat16)
    config = dataclasses.replace(compose([]).config.render, steps=24, size=64, margin=8)
    units = [(channel, 0) for channel in range(4)]
    exact = render(RenderJob(folded, layer, config, 0), units)
    rough = render(RenderJob(folded, layer, config, 0, step_model=lowered), units)
    (alone,) = render(RenderJob(folded, layer, config, 0, step_model=lowered), units[2:3])
    assert alone.activation == pytest.approx(rough[2].activation, rel=0.05)
    reached = [mine.activation / theirs.activation for mine, theirs in zip(rough, exact, strict=True)]
    assert all(0.8 < ratio < 1.25 for ratio in reached), reached
    with capture(folded, [layer]) as forward, torch.no_grad():
        picture = torch.from_numpy(rough[0].image).permute(2, 0, 1)[None].float() / 255
        again = forward(picture)[layer.name][0, 0].mean().item()
    assert rough[0].activation == pytest.approx(again, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_an_atlas_says_what_its_steps_were_computed_in(
    tiny_run: list[str], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`verify` renders again in the same, whatever this machine would choose."""
    # After a dozen steps some pictures are still the unit's colours and no more, from whatever start.
    tiny_run = [*tiny_run, "render.steps=24"]

    def plan(precision: str) -> Plan:
        return make_plan(compose([*tiny_run, f"engine.precision={precision}"]).config)

    request = compose([*tiny_run, f"engine.precision={precision}"])
    assert run(request, plan(precision), ("render",)) == 0
    folder = RunFolder(request.config.folder)
    with h5py.File(folder.atlas) as file:
        layers: Any = file["layers"]
        told = {preset.attrs["precision"] for layer in layers.values() for preset in layer["render"].values()}
    assert told == {precision}
    # `auto` means the precision of the results that are there, whatever this machine would choose.
    other = plan("auto")
    assert other.setup.precision == precision
    assert verify(folder, other, 3) == []
    # A picture from another start is another picture.
    whole = worker.render
    monkeypatch.setattr(worker, "render", lambda job, units, _: whole(dataclasses.replace(job, seed=99), units))
    assert len(verify(folder, other, 3)) == 3


def test_noise_on_weights_is_made_on_the_network_as_it_is(tiny_run: list[str]) -> None:
    images = []
    for precision in ("bfloat16", "float32"):
        config = compose([*tiny_run, "render=weight_noise", "render.size=32", f"engine.precision={precision}"]).config
        images.append(Worker(make_plan(config).setup).pictures("conv_stem", [0], (32, 32), config.render)[0].image)
    assert np.array_equal(*images)
