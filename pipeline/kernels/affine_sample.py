"""Pictures seen through a matrix: bilinear, with what lies beyond the edge reflected.

`grid_sample` writes down where every pixel comes from, reads that again, and gives its picture in a layout that the
network has to turn round. sampling.c does it picture by picture in the processor's nearest, all channels of a pixel at
once and straight into the network's layout; the step of an early layer waited a sixth of its time for `grid_sample`.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels import build

Size = tuple[int, int]

# The longest row and the most channels that sampling.c has room for.
WIDE, DEEP = 2048, 4


def sample(images: Tensor, matrix: Tensor, size: Size) -> Tensor:
    """(B, C, H, W) seen through `matrix` (B, 3, 3; output → input pixels from the centre) as (B, C, *size)."""
    fits = images.device.type == "cpu" and images.dtype == torch.float32 and size[1] <= WIDE and images.shape[1] <= DEEP
    loop = _loop() if fits else None
    if loop is None:
        return by_grid(images, matrix, size)
    return _Sample.apply(images, matrix[:, :2].to(torch.float32).contiguous(), size, loop)


def by_grid(images: Tensor, matrix: Tensor, size: Size) -> Tensor:
    """The same by PyTorch's own operations, on any device."""
    height, width = images.shape[-2:]
    # From pixels about the centre to grid_sample's [-1, 1]: of the output on the right, of the input on the left.
    to = matrix.new_tensor([2 / width, 2 / height]).view(1, 2, 1)
    of = matrix.new_tensor([size[1] / 2, size[0] / 2, 1.0]).view(1, 1, 3)
    theta = matrix[:, :2, :] * to * of
    grid = F.affine_grid(theta.to(images.dtype), [*images.shape[:2], *size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


_Loop = Callable[..., int]


@functools.cache
def _loop() -> _Loop | None:
    """sampling.c: what is read, the matrices, what is written, whether backwards, and six sizes."""
    library = build.library("affine_sample")
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
        ctx.matrix, ctx.numbers, ctx.loop = matrix, (*images.shape, *size), loop
        _Sample.run(ctx, images, view, backwards=False)
        return view.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = grads
        gradient = gradient.to(torch.float32).permute(0, 2, 3, 1).contiguous()
        found = gradient.new_empty(ctx.numbers[:4])
        _Sample.run(ctx, gradient, found, backwards=True)
        return found, None, None, None

    @staticmethod
    def run(ctx: Any, read: Tensor, written: Tensor, *, backwards: bool) -> None:
        """The loop, from one tensor to another."""
        if not ctx.loop(read.data_ptr(), ctx.matrix.data_ptr(), written.data_ptr(), backwards, *ctx.numbers):
            raise MemoryError("no room for a picture to be looked at")
