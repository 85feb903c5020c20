"""The resampling of affine_sample.py as Triton kernels for a GPU.

`torch.nn.functional.grid_sample` adds up the gradient of a pixel in the order in which threads arrive, so that two runs
differ in the last bits, which hundreds of steps amplify. Here the gradient is added up in integers, whose sum does not
depend on the order. The coordinates are those of affine_sample.c.

Nothing is copied between host and device, and the host does not wait: the kernels can be captured in a CUDA graph.
"""

# The types of Triton do not describe the language of its kernels.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.triton_check import COMPILATION, on_device_of

Size = tuple[int, int]

# Pixels for each program.
BLOCK = 256

# All addends to one pixel of a gradient together are below 4 · pixels of the view in units of a power of two that is at
# most the largest gradient of the image (an output pixel has weights with sum 1, and the largest gradient is below 4
# units). In fixed point with 60 - log2(pixels) bits after the point, rounded up, that stays below 2^62: no overflow.
SUM_BITS = 60


def sample(images: Tensor, matrix: Tensor, size: Size) -> Tensor:
    """Resample images through an affine matrix.

    Args:
        images: (B, C, H, W) in float32; B is at most 65535. C is a compile-time constant of the kernels.
        matrix: (B, 3, 3); maps output to input coordinates, both in pixels from the image center.
        size: Height and width of the output in pixels.

    Returns:
        (B, C, *size) in channels-last memory format. The gradient is propagated to `images`, not to `matrix`.
    """
    return _Sample.apply(images, matrix.detach().to(torch.float32).contiguous(), size)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, matrix: Tensor, size: Size) -> Tensor:
        images = images.contiguous()
        batch, channels, height, width = images.shape
        view = images.new_empty(batch, *size, channels)
        ctx.matrix, ctx.sizes = matrix, (batch, channels, height, width)
        grid = (triton.cdiv(size[0] * size[1], BLOCK), batch)
        with on_device_of(images):
            _sample[grid](images, matrix, view, height, width, *size, C=channels, BLOCK=BLOCK, **COMPILATION)
        return view.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        gradient = grads[0].to(torch.float32)
        batch, channels, height, width = ctx.sizes
        view_height, view_width = gradient.shape[2:]
        bits = SUM_BITS - (view_height * view_width - 1).bit_length()
        image_gradient = gradient.new_empty(ctx.sizes)
        with on_device_of(gradient):
            largest = torch.linalg.vector_norm(gradient, torch.inf, dim=(1, 2, 3))
            sums = torch.zeros(ctx.sizes, dtype=torch.int64, device=gradient.device)
            _scatter[triton.cdiv(view_height * view_width, BLOCK), batch](
                gradient,
                largest,
                ctx.matrix,
                sums,
                *gradient.stride(),
                height,
                width,
                view_height,
                view_width,
                2.0**bits,
                C=channels,
                BLOCK=BLOCK,
                **COMPILATION,
            )
            pixels = channels * height * width
            _to_float[triton.cdiv(pixels, BLOCK), batch](
                sums, largest, image_gradient, pixels, 2.0**-bits, BLOCK=BLOCK, **COMPILATION
            )
        return image_gradient, None, None


@triton.jit
def _reflect(x, size):
    """Reflect a coordinate at the outer edges of the first and last pixel, then clamp it to their centers."""
    distance = tl.abs(x + 0.5)
    reflections = tl.floor(distance / size)
    remainder = distance - reflections * size
    odd = reflections - 2.0 * tl.floor(reflections * 0.5)
    value = tl.where(odd > 0.5, size - remainder, remainder) - 0.5
    # Comparisons, so that NaN becomes 0: no offset is outside the image.
    value = tl.where(value > 0.0, value, 0.0)
    return tl.where(value < size - 1.0, value, size - 1.0)


@triton.jit
def _locate(matrix, pixel, H, W, h, w):
    """Return the offsets of the four input neighbors of output pixels (two above, two below) and their weights."""
    height, width = H.to(tl.float32), W.to(tl.float32)
    dx = (pixel % w).to(tl.float32) + 0.5 - w.to(tl.float32) * 0.5
    dy = (pixel // w).to(tl.float32) + 0.5 - h.to(tl.float32) * 0.5
    x0 = tl.load(matrix + 1) * dy + tl.load(matrix + 2) + width * 0.5 - 0.5
    y0 = tl.load(matrix + 4) * dy + tl.load(matrix + 5) + height * 0.5 - 0.5
    fx = _reflect(tl.load(matrix) * dx + x0, width)
    fy = _reflect(tl.load(matrix + 3) * dx + y0, height)
    left, top = fx.to(tl.int32), fy.to(tl.int32)
    right, below = tl.minimum(left + 1, W - 1), tl.minimum(top + 1, H - 1)
    u, v = fx - left.to(tl.float32), fy - top.to(tl.float32)
    offsets = (top * W + left, top * W + right, below * W + left, below * W + right)
    weights = ((1 - u) * (1 - v), u * (1 - v), (1 - u) * v, u * v)
    return offsets, weights


@triton.jit(do_not_specialize=["H", "W", "h", "w"], do_not_specialize_on_alignment=["matrix"])
def _sample(images, matrix, views, H, W, h, w, C: tl.constexpr, BLOCK: tl.constexpr):
    """Sample images (B, C, H, W) into views (B, h, w, C)."""
    image = tl.program_id(1).to(tl.int64)  # offsets into a batch may exceed 31 bits
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < h * w
    offsets, weights = _locate(matrix + image * 9, pixel, H, W, h, w)
    for c in tl.static_range(C):
        plane = images + (image * C + c) * H * W
        value = weights[0] * tl.load(plane + offsets[0], mask=inside, other=0.0)
        for i in tl.static_range(1, 4):
            value += weights[i] * tl.load(plane + offsets[i], mask=inside, other=0.0)
        tl.store(views + (image * h * w + pixel) * C + c, value, mask=inside)


@triton.jit
def _unit(largest):
    """Return the power of two that is at most `largest`, its inverse, and whether `largest` is finite.

    The power is between 2^-100 and 2^126, so that the inverse is a number in float32; of smaller gradients the last
    bits are lost.
    """
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    limited = tl.minimum(tl.maximum(exponent, 27), 253)
    unit, inverse = (limited << 23).to(tl.float32, bitcast=True), ((254 - limited) << 23).to(tl.float32, bitcast=True)
    return unit, inverse, exponent < 255


@triton.jit(do_not_specialize=["gb", "gc", "gh", "gw", "H", "W", "h", "w"], do_not_specialize_on_alignment=["matrix"])
def _scatter(
    gradients,
    largest,
    matrix,
    sums,
    gb,
    gc,
    gh,
    gw,
    H,
    W,
    h,
    w,
    scale,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the gradients of views (B, C, h, w), of any strides, to those of images (B, C, H, W) in fixed point.

    An addend is rounded towards 0. Its error is below 1 / `scale` times the largest gradient of the image: 2^-44 of it
    for views of 256 × 256 pixels. That is less than the rounding of the product in float32 unless it is tiny.
    """
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _power, inverse, finite = _unit(tl.load(largest + image))
    # Gradients with infinity or NaN have no fixed-point numbers; `_to_float` writes NaN for them.
    inside = pixel < tl.where(finite, h * w, 0)
    offsets, weights = _locate(matrix + image * 9, pixel, H, W, h, w)
    source = gradients + image * gb + (pixel // w).to(tl.int64) * gh + (pixel % w).to(tl.int64) * gw
    for c in tl.static_range(C):
        gradient = tl.load(source + c * gc, mask=inside, other=0.0) * inverse
        plane = sums + (image * C + c) * H * W
        for i in tl.static_range(4):
            addend = (gradient * weights[i] * scale).to(tl.int64)
            tl.atomic_add(plane + offsets[i], addend, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["n"])
def _to_float(sums, largest, gradients, n, inverse_scale, BLOCK: tl.constexpr):
    """Convert sums (B, n) of `_scatter` to gradients in float32."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unit, _inverse, finite = _unit(tl.load(largest + image))
    value = tl.load(sums + image * n + i, mask=i < n, other=0).to(tl.float32) * inverse_scale
    tl.store(gradients + image * n + i, value * tl.where(finite, unit, float("nan")), mask=i < n)
