"""Gradients of convolutions that stride over their maps: depthwise ones, and the first, that reads a picture's colours.

PyTorch's own spread the gradient out over the stride, with zeros between, and convolve that: three of four products
are with nothing. striding.c goes through the maps in the order of memory and adds up just the taps that met a place.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.kernels import build
from pipeline.kernels.types import Limits

Pair = tuple[int, int]

# The channels that striding.c works on together, of which a depthwise convolution must have as many; and its most taps.
LANES, TAPS = 16, 256


def available(x: Tensor) -> bool:
    """Whether the loops take maps of this kind: on a CPU, float32 or bfloat16; and whether a compiler is there."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and _loops() is not None


def depthwise(
    gradient: Tensor,
    rectified: Tensor | None,
    limits: Limits | None,
    weights: Tensor,
    size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair = (1, 1),
) -> Tensor:
    """The gradient (B, C, h, w) of what a depthwise convolution gave → that of the maps (B, C, *size) it was given.

    A rectifier of `limits` may stand behind the convolution, and gave `rectified` (B, C, h, w). `weights` are float32,
    (kh, kw, C), and `padding` that above and to the left. C is at least `LANES`, kh × kw at most `TAPS`.
    """
    loops = _loops()
    assert loops is not None
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    if rectified is not None:
        rectified = rectified.contiguous(memory_format=torch.channels_last)
    found = _maps(gradient, gradient.shape[1], size)
    low, high = limits or (0.0, None)
    sizes = _sizes(gradient, gradient.shape[1], size, weights.shape[:2], stride, padding, dilation)
    gate = None if rectified is None or limits is None else rectified.data_ptr()
    half = gradient.dtype == torch.bfloat16
    if not loops[0](
        gradient.data_ptr(), gate, weights.data_ptr(), found.data_ptr(), half, low,
        torch.inf if high is None else high, sizes,
    ):  # fmt: skip
        raise MemoryError("no room for the gradient of a convolution")
    return found


def dense(gradient: Tensor, weights: Tensor, kernel: Pair, size: Pair, stride: Pair, padding: Pair) -> Tensor:
    """The gradient (B, K, h, w) of what a convolution gave → that of the maps (B, C, *size) it was given.

    `weights` are (K, kh × kw × C) in the gradient's dtype: a matrix product says what each window gets, which is little
    where C is small.
    """
    loops = _loops()
    assert loops is not None
    rows = gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1])
    windows = rows @ weights
    channels = weights.shape[1] // (kernel[0] * kernel[1])
    found = _maps(gradient, channels, size)
    sizes = _sizes(gradient, channels, size, kernel, stride, padding, (1, 1))
    if not loops[1](windows.data_ptr(), found.data_ptr(), gradient.dtype == torch.bfloat16, sizes):
        raise MemoryError("no room for the gradient of a convolution")
    return found


def _maps(like: Tensor, channels: int, size: Pair) -> Tensor:
    """(B, channels, *size), channels last, to be written to."""
    return like.new_empty(len(like), *size, channels).permute(0, 3, 1, 2)


def _sizes(gradient: Tensor, channels: int, size: Pair, *more: Sequence[int]) -> ctypes.Array[ctypes.c_ssize_t]:
    numbers = (len(gradient), channels, *size, *gradient.shape[-2:], *(n for pair in more for n in pair))
    return (ctypes.c_ssize_t * len(numbers))(*numbers)


@functools.cache
def _loops() -> tuple[Callable[..., int], Callable[..., int]] | None:
    """striding.c: of depthwise convolutions and of others; None where it can't be compiled."""
    library = build.library("strided_conv_backward", fused=True)
    if library is None:
        return None
    pointer, sizes = ctypes.c_void_p, ctypes.POINTER(ctypes.c_ssize_t)
    library.depthwise.argtypes = [pointer] * 4 + [ctypes.c_int] + [ctypes.c_float] * 2 + [sizes]
    library.overlap.argtypes = [pointer] * 2 + [ctypes.c_int, sizes]
    return library.depthwise, library.overlap
