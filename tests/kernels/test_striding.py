"""Gradients over strides are PyTorch's own, for any sizes, and nothing is needed of a compiler."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.acceleration.cpu_lowering import Depthwise, FirstConv
from pipeline.kernels import strided_conv_backward

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler here")

PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))


def wanted(x: Tensor, weight: Tensor, gradient: Tensor, open_: Tensor | None, groups: int, **numbers: object) -> Tensor:
    """The gradient by autograd, in float64, of what lies behind a rectifier that is open where `open_` says."""
    x = x.double().requires_grad_(True)
    y = F.conv2d(x, weight.double(), groups=groups, **numbers)  # type: ignore[arg-type]
    gradient = gradient.double() if open_ is None else gradient.double() * open_
    return torch.autograd.grad(y, x, gradient)[0]


def close(mine: Tensor, theirs: Tensor) -> None:
    """To the rounding of what `mine` is: of a sum of products, and of what is written."""
    rtol = 1e-4 if mine.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(mine.double(), theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()) + 1e-6)


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    seed=st.integers(0, 999),
    channels=st.integers(strided_conv_backward.LANES, 40),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=PAIRS,
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    half=st.booleans(),
    limits=st.sampled_from([None, (0.0, None), (0.0, 6.0)]),
    threads=st.integers(1, 2),
)
def test_a_depthwise_gradient_is_autograds(
    data: st.DataObject,
    seed: int,
    channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    half: bool,
    limits: tuple[float, float | None] | None,
    threads: int,
) -> None:
    """Through the rectifier behind it, where there is one."""
    generator = torch.Generator().manual_seed(seed)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = (data.draw(st.integers(0, reach[0])), data.draw(st.integers(0, reach[1])))
    size = (data.draw(st.integers(reach[0] + 1, 40)), data.draw(st.integers(reach[1] + 1, 23)))
    x = torch.randn(2, channels, *size, generator=generator)
    weight = torch.randn(channels, 1, *kernel, generator=generator)
    numbers = {"stride": stride, "padding": padding, "dilation": dilation}
    y = F.conv2d(x, weight, groups=channels, **numbers)  # type: ignore[arg-type]
    dtype = torch.bfloat16 if half else torch.float32
    gradient = torch.randn(y.shape, generator=generator).to(dtype)
    rectified = None if limits is None else y.clamp(*limits).to(dtype)
    passes = None if rectified is None or limits is None else (rectified > 0) & (rectified < (limits[1] or torch.inf))
    taps = weight[:, 0].permute(1, 2, 0).contiguous()
    before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    try:
        geometry = strided_conv_backward.ConvGeometry(size, stride, padding, dilation)
        found = strided_conv_backward.depthwise(gradient, taps, geometry, rectified, limits)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    close(found, wanted(x, weight, gradient, passes, channels, **numbers))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), channels=st.integers(1, 4), wide=st.integers(1, 9), kernel=PAIRS, stride=PAIRS, half=st.booleans()
)
def test_the_gradient_of_a_first_convolution_is_autograds(
    data: st.DataObject, channels: int, wide: int, kernel: tuple[int, int], stride: tuple[int, int], half: bool
) -> None:
    padding = (data.draw(st.integers(0, kernel[0] - 1)), data.draw(st.integers(0, kernel[1] - 1)))
    size = (data.draw(st.integers(kernel[0], 17)), data.draw(st.integers(kernel[1], 17)))
    generator = torch.Generator().manual_seed(7)
    dtype = torch.bfloat16 if half else torch.float32
    x = torch.randn(3, channels, *size, generator=generator)
    weight = torch.randn(wide, channels, *kernel, generator=generator).to(dtype)
    y = F.conv2d(x, weight.float(), stride=stride, padding=padding)
    gradient = torch.randn(y.shape, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    geometry = strided_conv_backward.ConvGeometry(size, stride, padding)
    found = strided_conv_backward.dense(gradient, weight.permute(0, 2, 3, 1).flatten(1), kernel, geometry)
    close(found, wanted(x, weight, gradient, None, 1, stride=stride, padding=padding))


@pytest.mark.parametrize("conv", [nn.Conv2d(20, 20, 5, 2, 2, groups=20), nn.Conv2d(3, 8, 3, 2, 1)], ids=str)
def test_without_a_compiler_pytorch_does_it(conv: nn.Conv2d, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = (Depthwise if conv.groups > 1 else FirstConv)(conv, (0.0, None))
    x = torch.randn(2, conv.in_channels, 15, 12, generator=torch.Generator().manual_seed(1))
    assert strided_conv_backward.is_available(x) and not strided_conv_backward.is_available(x.double())

    def gradient() -> Tensor:
        own = x.clone().requires_grad_(True)
        return torch.autograd.grad(lowered(own).square().sum(), own)[0]

    fast = gradient()
    monkeypatch.setattr(strided_conv_backward, "_loops", lambda: None)
    assert not strided_conv_backward.is_available(x)
    torch.testing.assert_close(fast, gradient(), rtol=1e-4, atol=1e-5)
