"""Input gradients of strided convolutions: depthwise ones, and the first convolution of a network.

PyTorch spreads the gradient over the stride with zeros in between and convolves the result; with a stride of 2 three of
four products are with zeros. strided_conv_backward.c walks the maps in memory order and adds up only the kernel
positions ("taps") that contributed.
"""

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.kernels import build
from pipeline.kernels.types import PassRange

Pair = tuple[int, int]

# Fewest channels and most taps of a depthwise convolution that strided_conv_backward.c supports.
LANES, MAX_TAPS = 16, 256


@dataclasses.dataclass(frozen=True)
class ConvGeometry:
    """Sizes of a convolution, each as (vertical, horizontal).

    Attributes:
        input_size: Height and width of its input.
        stride: Its stride.
        padding: Padding above and to the left.
        dilation: Distance between taps.
    """

    input_size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair = (1, 1)


def is_available(x: Tensor) -> bool:
    """Return whether the loops support maps like `x` (float32 or bfloat16 on a CPU) and could be compiled."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and _loops() is not None


def depthwise(
    gradient: Tensor,
    weights: Tensor,
    geometry: ConvGeometry,
    rectified: Tensor | None = None,
    limits: PassRange | None = None,
) -> Tensor:
    """Return the input gradient of a depthwise convolution, optionally followed by a rectifier.

    Args:
        gradient: Gradient of the output, (B, C, h, w) with C ≥ `LANES`.
        weights: (kh, kw, C) float32 with kh × kw ≤ `MAX_TAPS`.
        geometry: Input size, stride, padding and dilation of the convolution.
        rectified: Output of the rectifier behind the convolution, (B, C, h, w).
        limits: Range that the rectifier passes unchanged. The gradient is zero outside.

    Returns:
        Gradient of the input, (B, C, *input_size), channels last.

    Raises:
        MemoryError: If a buffer cannot be allocated.
    """
    loops = _loops()
    assert loops is not None
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    if rectified is not None:
        rectified = rectified.contiguous(memory_format=torch.channels_last)
    input_gradient = _empty_maps(gradient, gradient.shape[1], geometry.input_size)
    low, high = limits or (0.0, None)
    gate = None if rectified is None or limits is None else rectified.data_ptr()
    allocated = loops[0](
        gradient.data_ptr(),
        gate,
        weights.data_ptr(),
        input_gradient.data_ptr(),
        gradient.dtype == torch.bfloat16,
        low,
        torch.inf if high is None else high,
        _sizes(gradient, gradient.shape[1], weights.shape[:2], geometry),
    )
    if not allocated:
        raise MemoryError("There is not enough memory for the gradient of a convolution.")
    return input_gradient


def dense(gradient: Tensor, weights: Tensor, kernel: Pair, geometry: ConvGeometry) -> Tensor:
    """Return the input gradient of a convolution with few input channels.

    A matrix product computes the gradient of each window, (B, h, w, kh × kw × C), which is small where C is small; the
    windows are then added up.

    Args:
        gradient: Gradient of the output, (B, K, h, w).
        weights: (K, kh × kw × C), in the dtype of `gradient`.
        kernel: (kh, kw).
        geometry: Input size, stride and padding of the convolution; the dilation must be 1.

    Returns:
        Gradient of the input, (B, C, *input_size), channels last.

    Raises:
        MemoryError: If a buffer cannot be allocated.
    """
    loops = _loops()
    assert loops is not None
    rows = gradient.permute(0, 2, 3, 1).reshape(-1, gradient.shape[1])
    windows = rows @ weights
    channels = weights.shape[1] // (kernel[0] * kernel[1])
    input_gradient = _empty_maps(gradient, channels, geometry.input_size)
    sizes = _sizes(gradient, channels, kernel, geometry)
    if not loops[1](windows.data_ptr(), input_gradient.data_ptr(), gradient.dtype == torch.bfloat16, sizes):
        raise MemoryError("There is not enough memory for the gradient of a convolution.")
    return input_gradient


def _empty_maps(like: Tensor, channels: int, size: Pair) -> Tensor:
    """Return uninitialized maps (B, channels, *size), channels last, with the batch size and dtype of `like`."""
    return like.new_empty(len(like), *size, channels).permute(0, 3, 1, 2)


def _sizes(
    gradient: Tensor, channels: int, kernel: Sequence[int], geometry: ConvGeometry
) -> ctypes.Array[ctypes.c_ssize_t]:
    """Return the sizes in the order that the C functions read them."""
    pairs = (kernel, geometry.stride, geometry.padding, geometry.dilation)
    numbers = (
        len(gradient),
        channels,
        *geometry.input_size,
        *gradient.shape[-2:],
        *(number for pair in pairs for number in pair),
    )
    return (ctypes.c_ssize_t * len(numbers))(*numbers)


@functools.cache
def _loops() -> tuple[Callable[..., int], Callable[..., int]] | None:
    """Return `depthwise` and `overlap` of strided_conv_backward.c, or None if it cannot be compiled."""
    library = build.load_library("strided_conv_backward", fused=True)
    if library is None:
        return None
    pointer, sizes = ctypes.c_void_p, ctypes.POINTER(ctypes.c_ssize_t)
    library.depthwise.argtypes = [pointer] * 4 + [ctypes.c_int] + [ctypes.c_float] * 2 + [sizes]
    library.overlap.argtypes = [pointer] * 2 + [ctypes.c_int, sizes]
    return library.depthwise, library.overlap
