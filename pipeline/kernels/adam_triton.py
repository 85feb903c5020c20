"""The step of Adam as two Triton kernels for a GPU: it reads and writes memory twice, where PyTorch does ten times.

The reference is `adam.step_with_pytorch`. All numbers that change from step to step are in a tensor on the
device, nothing is copied between host and device, and the host does not wait: the step can be captured in a CUDA graph.
Sums are made in a fixed order: two runs give the same bits.
"""

# The types of Triton do not describe the language of its kernels.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from pipeline.kernels.triton_check import COMPILATION, on_device_of

# Second moments for each program.
BLOCK = 1024


def fused_adam(parameters: Tensor, gradient: Tensor, first: Tensor, second: Tensor, numbers: Tensor) -> None:
    """Make one Adam step up the gradient for each image, in place.

    Args:
        parameters: (B, …) in float32, contiguous, as all tensors; B is at most 65535.
        gradient: As `parameters`.
        first: First moments, as `parameters`; updated in place.
        second: Second moments, as `parameters`, or with a last axis of size 1 if the entries of the last axis share
            one; updated in place.
        numbers: See `adam.NUMBERS`, on the same device.

    Raises:
        ValueError: If the type, the layout or the shape of a tensor is not as above.
    """
    tensors = (parameters, gradient, first, second)
    if not all(t.dtype == parameters.dtype and t.is_contiguous() for t in tensors):
        raise ValueError("The tensors of a step must be contiguous and of the same type.")
    shared = (*parameters.shape[:-1], 1)
    if not parameters.shape == gradient.shape == first.shape or second.shape not in (parameters.shape, shared):
        raise ValueError(f"Shapes {[tuple(t.shape) for t in tensors]} do not belong to one step.")
    batch, joint = len(parameters), first.numel() // second.numel()
    moments = second.numel() // batch
    parts = triton.cdiv(moments, BLOCK)
    with on_device_of(parameters):
        sums = second.new_empty(batch, parts)
        _update_moments[parts, batch](
            gradient, first, second, sums, numbers, moments, JOINT=joint, BLOCK=BLOCK, **COMPILATION
        )
        _move[parts, batch](
            parameters,
            gradient,
            first,
            second,
            sums,
            numbers,
            moments,
            JOINT=joint,
            PARTS=triton.next_power_of_2(parts),
            BLOCK=BLOCK,
            **COMPILATION,
        )


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["numbers"])
def _update_moments(gradients, firsts, seconds, sums, numbers, n, JOINT: tl.constexpr, BLOCK: tl.constexpr):
    """Update the moments; write the sum of the second moments of this program to `sums` (B, programs)."""
    image = tl.program_id(1).to(tl.int64)  # offsets into a batch may exceed 31 bits
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    beta1, beta2 = tl.load(numbers), tl.load(numbers + 1)
    square = tl.zeros([BLOCK], dtype=tl.float32)
    for j in tl.static_range(JOINT):
        at = (image * n + i) * JOINT + j
        gradient = tl.load(gradients + at, mask=inside, other=0.0)
        first = tl.load(firsts + at, mask=inside, other=0.0)
        tl.store(firsts + at, first + (1 - beta1) * (gradient - first), mask=inside)
        square += gradient * gradient
    second = tl.load(seconds + image * n + i, mask=inside, other=0.0)
    second += (1 - beta2) * (square * (1.0 / JOINT) - second)
    tl.store(seconds + image * n + i, second, mask=inside)
    tl.store(sums + image * tl.num_programs(0) + tl.program_id(0), tl.sum(second, axis=0))


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["numbers"])
def _move(
    parameters,
    gradients,
    firsts,
    seconds,
    sums,
    numbers,
    n,
    JOINT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move the parameters by the step; PARTS is the number of programs, rounded up to a power of two."""
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    moment_factor, gradient_factor = tl.load(numbers + 2), tl.load(numbers + 3)
    damping, epsilon, step_size = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
    part = tl.arange(0, PARTS)
    partial = tl.load(sums + image * tl.num_programs(0) + part, mask=part < tl.num_programs(0), other=0.0)
    offset = damping * tl.sqrt(tl.sum(partial, axis=0) / n.to(tl.float32)) + epsilon
    denominator = tl.sqrt(tl.load(seconds + image * n + i, mask=inside, other=1.0)) + offset
    for j in tl.static_range(JOINT):
        at = (image * n + i) * JOINT + j
        direction = moment_factor * tl.load(firsts + at, mask=inside, other=0.0)
        direction += gradient_factor * tl.load(gradients + at, mask=inside, other=0.0)
        parameter = tl.load(parameters + at, mask=inside, other=0.0)
        tl.store(parameters + at, parameter + step_size * direction / denominator, mask=inside)
