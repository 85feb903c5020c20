"""A step of Adam whose numbers are in a tensor on the device, so that a CUDA graph of the step serves all steps."""

import torch
from torch import Tensor

from pipeline.kernels.triton_check import is_verified

# What the tensor of numbers, float32, contains, in this order; see `Adam.step` in visualization/optimizers.py.
# A step of size 0 still updates the moments.
NUMBERS = ("beta1", "beta2", "moment_factor", "gradient_factor", "damping", "epsilon", "step_size")


@torch.no_grad()
def step(parameters: Tensor, gradient: Tensor, first: Tensor, second: Tensor, numbers: Tensor) -> None:
    """Make one Adam step up the gradient, in place, in Triton where possible.

    Args:
        parameters: (B, …).
        gradient: (B, …).
        first: First moments (B, …); updated in place.
        second: Second moments, (B, …), or with a last axis of size 1 if the entries of the last axis share one; updated
            in place.
        numbers: Begins with `NUMBERS`, (7 or more,) in float32, contiguous, on the device of the parameters.
    """
    tensors = (parameters, gradient, first, second)
    supported = parameters.is_cuda and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    if supported and is_verified("adam", parameters.device, check_triton):
        # Only here: PyTorch for CPUs comes without Triton.
        from pipeline.kernels.adam_triton import fused_adam

        fused_adam(*tensors, numbers)
    else:
        step_with_pytorch(*tensors, numbers)


def prepare(parameters: Tensor, first: Tensor, second: Tensor) -> None:
    """Check and compile the kernels for tensors like these: both are impossible while a CUDA graph is captured."""
    numbers = torch.zeros(len(NUMBERS), device=parameters.device)
    zeros = [torch.zeros_like(tensor) for tensor in (parameters, first, second)]
    step(zeros[0], zeros[0].clone(), zeros[1], zeros[2], numbers)


@torch.no_grad()
def step_with_pytorch(parameters: Tensor, gradient: Tensor, first: Tensor, second: Tensor, numbers: Tensor) -> None:
    """Compute `step` with PyTorch operations, on any device."""
    beta1, beta2, moment_factor, gradient_factor, damping, epsilon, step_size = numbers[:7].unbind()
    first.lerp_(gradient, 1 - beta1)
    square = gradient * gradient
    if second.shape != first.shape:
        square = square.mean(-1, keepdim=True)
    second.lerp_(square, 1 - beta2)
    mean_square = second.mean(dim=tuple(range(1, second.ndim)), keepdim=True)
    denominator = second.sqrt().add_(damping * mean_square.sqrt() + epsilon)
    direction = first * moment_factor + gradient * gradient_factor
    parameters.add_(direction.mul_(step_size).div_(denominator))


def check_triton(device: torch.device) -> None:
    """Compare the Triton kernels with PyTorch, for second moments of their own and shared ones.

    Raises:
        ImportError: If Triton is not installed.
        AssertionError: If parameters or moments differ.
    """
    from pipeline.kernels.adam_triton import fused_adam

    numbers = torch.tensor([0.5, 0.9, 1.1, 0.3, 0.03, 1e-8, 0.1]).to(device)
    for shared in (False, True):
        seen = []
        for function in (step_with_pytorch, fused_adam):
            parameters, gradient, first, second = (
                torch.linspace(0, end, 2 * 1500 * 2).sin().view(2, 1500, 2).to(device) for end in (10, 20, 30, 40)
            )
            second = second[..., :1].square().contiguous() if shared else second.square()
            function(parameters, gradient, first, second, numbers)
            seen.append((parameters, first, second))
        torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)
