"""Bilinear affine resampling of images with reflection at the borders.

`torch.nn.functional.grid_sample` writes a coordinate for every pixel, reads them again, and returns its images in a
layout that the network has to convert. affine_sample.c processes one image at a time in the CPU cache, all channels of
a pixel at once, and writes channels-last directly. With `grid_sample` the resampling took a sixth of a step of an early
layer.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.device_tensors import constant_like
from pipeline.kernels import build

Size = tuple[int, int]

# Longest output row and most channels that the buffers of affine_sample.c have room for.
MAX_WIDTH, MAX_CHANNELS = 2048, 4


def sample(images: Tensor, matrix: Tensor, size: Size) -> Tensor:
    """Resample images through an affine matrix, in C where possible.

    Args:
        images: (B, C, H, W).
        matrix: (B, 3, 3); maps output to input coordinates, both in pixels from the image center.
        size: Height and width of the output in pixels.

    Returns:
        (B, C, *size). The gradient is propagated to `images`, not to `matrix`.
    """
    supported = (
        images.device.type == "cpu"
        and images.dtype == torch.float32
        and size[1] <= MAX_WIDTH
        and images.shape[1] <= MAX_CHANNELS
    )
    loop = _loop() if supported else None
    if loop is None:
        return sample_with_pytorch(images, matrix, size)
    return _Sample.apply(images, matrix[:, :2].to(torch.float32).contiguous(), size, loop)


def sample_with_pytorch(images: Tensor, matrix: Tensor, size: Size) -> Tensor:
    """Compute `sample` with PyTorch operations, on any device."""
    height, width = images.shape[-2:]
    # grid_sample takes coordinates in [-1, 1]: scale from pixels on the output side and to pixels on the input side.
    input_scale = constant_like(matrix, (2 / width, 2 / height)).view(1, 2, 1)
    output_scale = constant_like(matrix, (size[1] / 2, size[0] / 2, 1.0)).view(1, 1, 3)
    theta = matrix[:, :2, :] * input_scale * output_scale
    grid = F.affine_grid(theta.to(images.dtype), [*images.shape[:2], *size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


_Loop = Callable[..., int]


@functools.cache
def _loop() -> _Loop | None:
    """Return `sample` of affine_sample.c, or None if it cannot be compiled.

    Its arguments are the source, the matrices, the target, a flag for the backward direction, and six sizes.
    """
    library = build.load_library("affine_sample")
    if library is None:
        return None
    library.sample.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int] + [ctypes.c_ssize_t] * 6
    library.sample.restype = ctypes.c_int
    return library.sample


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, matrix: Tensor, size: Size, loop: _Loop) -> Tensor:
        images = images.contiguous()
        view = images.new_empty(len(images), *size, images.shape[1])
        ctx.matrix, ctx.sizes, ctx.loop = matrix, (*images.shape, *size), loop
        _Sample.run(ctx, images, view, backward=False)
        return view.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (view_gradient,) = grads
        view_gradient = view_gradient.to(torch.float32).permute(0, 2, 3, 1).contiguous()
        image_gradient = view_gradient.new_empty(ctx.sizes[:4])
        _Sample.run(ctx, view_gradient, image_gradient, backward=True)
        return image_gradient, None, None, None

    @staticmethod
    def run(ctx: Any, source: Tensor, target: Tensor, *, backward: bool) -> None:
        """Call the C loop from `source` to `target`."""
        if not ctx.loop(source.data_ptr(), ctx.matrix.data_ptr(), target.data_ptr(), backward, *ctx.sizes):
            raise MemoryError("There is not enough memory to resample an image.")
