"""Bilinear affine resampling of images with reflection at the borders.

`torch.nn.functional.grid_sample` writes a coordinate for every pixel, reads them again, and returns its images in a
layout that the network has to convert. affine_sample.c processes one image at a time in the CPU cache, all channels of
a pixel at once, and writes channels-last directly. With `grid_sample` the resampling took a sixth of a step of an early
layer. On a GPU affine_sample_triton.py does the same, with a gradient that is equal to the last bit in every run.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.kernels import build
from pipeline.kernels.triton_check import is_verified

Size = tuple[int, int]

# Longest output row and most channels that the buffers of affine_sample.c have room for.
MAX_WIDTH, MAX_CHANNELS = 2048, 4


def sample(images: Tensor, matrix: Tensor, size: Size) -> Tensor:
    """Resample images through an affine matrix, in C or Triton where possible.

    Args:
        images: (B, C, H, W).
        matrix: (B, 3, 3); maps output to input coordinates, both in pixels from the image center.
        size: Height and width of the output in pixels.

    Returns:
        (B, C, *size). The gradient is propagated to `images`, not to `matrix`.
    """
    if images.dtype != torch.float32 or images.shape[1] > MAX_CHANNELS:
        return sample_with_pytorch(images, matrix, size)
    if images.device.type == "cuda" and is_verified("affine_sample", images.device, check_triton):
        # Only here: PyTorch for CPUs comes without Triton.
        from pipeline.kernels import affine_sample_triton

        return affine_sample_triton.sample(images, matrix, size)
    loop = _loop() if images.device.type == "cpu" and size[1] <= MAX_WIDTH else None
    if loop is None:
        return sample_with_pytorch(images, matrix, size)
    return _Sample.apply(images, matrix[:, :2].to(torch.float32).contiguous(), size, loop)


def sample_with_pytorch(images: Tensor, matrix: Tensor, size: Size) -> Tensor:
    """Compute `sample` with PyTorch operations, on any device."""
    height, width = images.shape[-2:]
    # grid_sample takes coordinates in [-1, 1]: scale from pixels on the output side and to pixels on the input side. By
    # numbers and not by tensors: these would be copied to a GPU at every call, and the host would wait for it.
    theta = matrix[:, :2].clone()
    theta[:, 0].mul_(2 / width)
    theta[:, 1].mul_(2 / height)
    theta[:, :, 0].mul_(size[1] / 2)
    theta[:, :, 1].mul_(size[0] / 2)
    grid = F.affine_grid(theta.to(images.dtype), [*images.shape[:2], *size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def check_triton(device: torch.device) -> None:
    """Compare the Triton kernels with PyTorch for a rotation, and a flip and a shift by more than the image.

    Raises:
        ImportError: If Triton is not installed.
        AssertionError: If values or gradients differ, or two gradients for the same input.
    """
    from pipeline.kernels import affine_sample_triton

    images = torch.linspace(0, 40, 2 * 3 * 13 * 9).sin().view(2, 3, 13, 9).to(device).requires_grad_(True)
    rows = [[[0.8, -0.6, 1.3], [0.6, 0.8, -2.1], [0, 0, 1]], [[-1.9, 0, 30.2], [0, 0.45, -17.3], [0, 0, 1]]]
    matrix, size = torch.tensor(rows).to(device), (11, 7)
    weights = torch.linspace(0, 50, 2 * 3 * 11 * 7).cos().view(2, 3, 11, 7).to(device)
    seen = []
    for function in (sample_with_pytorch, affine_sample_triton.sample, affine_sample_triton.sample):
        view = function(images, matrix, size)
        seen.append((view.detach(), torch.autograd.grad((view * weights).sum(), images)[0]))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen[1], seen[2], rtol=0, atol=0)


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
