"""Redirected ReLU gradients, for units whose activation is zero on the initial image.

ReLU passes no gradient to such a unit, so that its image would never change. Inside `redirected`, a ReLU that blocks
*all* of the gradient of an image passes the part that moves its input back to the active range.

After lucid/misc/redirected_relu_grad.py, with two differences: the test is made for each image, because with a test
for the whole batch one active unit would leave all others without gradient; and it works for any network, because the
forward methods of the modules are replaced and restored.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.kernels.types import PassRange

# Number of steps with redirected gradients, as in lucid.
REDIRECTED_STEPS = 16


def limits_of(module: nn.Module) -> PassRange | None:
    """Return the range that a ReLU or ReLU6 passes unchanged; None for other modules."""
    if type(module) is nn.ReLU:
        return 0.0, None
    return (0.0, 6.0) if type(module) is nn.ReLU6 else None


def rectifier_gradient(gradient: Tensor, rectified: Tensor | None, limits: PassRange | None) -> Tensor:
    """Return the gradient with respect to the input of a rectifier.

    Args:
        gradient: Gradient with respect to its output.
        rectified: Its output; its input gives the same result.
        limits: Its limits. If this or `rectified` is None, there is no rectifier.
    """
    if limits is None or rectified is None:
        return gradient
    low, high = limits
    return torch.ops.aten.hardtanh_backward(gradient, rectified, low, torch.inf if high is None else high)


def redirect(x: Tensor, limits: PassRange) -> Tensor:
    """Clamp `x` to `limits`, with a gradient that is redirected for images whose gradient would be zero."""
    return _Redirected.apply(x, limits[1])


class FusedRectifier(nn.Module):
    """A module that applies a rectifier itself, and calls `redirect` in its place while `redirecting` is set.

    Attributes:
        limits: Limits of the rectifier; None if there is none.
        redirecting: Whether to redirect gradients.
    """

    def __init__(self, limits: PassRange | None) -> None:
        super().__init__()
        self.limits, self.redirecting = limits, False


def has_zero_gradient(gradient: Tensor) -> Tensor:
    """Return for which images of a batch the gradient (B, …) is zero, as bool of shape (B, 1, …)."""
    return gradient.abs().sum(dim=tuple(range(1, gradient.ndim)), keepdim=True) == 0


class _Redirected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, high: float | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.high = high
        return x.clamp(min=0) if high is None else x.clamp(0, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,), (gradient,) = ctx.saved_tensors, grads
        ordinary = rectifier_gradient(gradient, x, (0.0, ctx.high))
        blocked = has_zero_gradient(ordinary)
        # On a GPU it takes longer to ask whether there is anything to do than to do it.
        can_skip = x.device.type == "cpu"
        if can_skip and not bool(blocked.any()):
            return ordinary, None
        # A gradient that was zero before this rectifier is not redirected: usually only one rectifier blocks it.
        blocked = blocked & ~has_zero_gradient(gradient)
        if can_skip and not bool(blocked.any()):
            return ordinary, None
        below = x <= 0
        above = torch.zeros_like(x, dtype=torch.bool) if ctx.high is None else x >= ctx.high
        # The objective is maximized, so a positive gradient raises the input.
        redirected_gradient = gradient * ((below & (gradient > 0)) | (above & (gradient < 0)))
        return torch.where(blocked, redirected_gradient, ordinary), None


def _redirecting_forward(limits: PassRange) -> Callable[[Tensor], Tensor]:
    """Return a forward method; its parameter is named as in nn.ReLU, for networks that pass it by keyword."""

    def forward(input: Tensor) -> Tensor:
        return redirect(input, limits)

    return forward


@contextlib.contextmanager
def redirected(module: nn.Module) -> Iterator[None]:
    """Redirect the gradients of all rectifiers (nn.ReLU, nn.ReLU6, `FusedRectifier`) of a module in this context."""
    replaced: list[nn.Module] = []
    switched: list[FusedRectifier] = []
    try:
        for child in module.modules():
            if isinstance(child, FusedRectifier):
                child.redirecting = True
                switched.append(child)
            elif isinstance(child, (nn.ReLU, nn.ReLU6)) and "forward" not in vars(child):
                limits = (0.0, 6.0 if isinstance(child, nn.ReLU6) else None)
                child.forward = _redirecting_forward(limits)  # type: ignore[method-assign]
                replaced.append(child)
        yield
    finally:
        for child in replaced:
            del child.forward
        for child in switched:
            child.redirecting = False
