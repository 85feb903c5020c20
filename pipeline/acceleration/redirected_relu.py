"""Units that are silent on the first picture: a rectifier passes them no gradient, and they would stay grey.

Inside `redirected`, rectifiers that stop *all* of an image's gradient pass on the part that would push their inputs
back to where they respond. After lucid/misc/redirected_relu_grad.py, but image by image (a batch-wide test leaves a
dead unit dead beside a living one), and for any network: the modules' forward is exchanged and put back.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.kernels.types import Limits

# lucid redirects during the first 16 steps.
REDIRECTED_STEPS = 16


def limits_of(module: nn.Module) -> Limits | None:
    """What a module of PyTorch's lets through; None for one that is no rectifier, or some other kind."""
    if type(module) is nn.ReLU:
        return 0.0, None
    return (0.0, 6.0) if type(module) is nn.ReLU6 else None


def passed(gradient: Tensor, rectified: Tensor | None, limits: Limits | None) -> Tensor:
    """What a rectifier that gave `rectified` passes on of a gradient."""
    if limits is None or rectified is None:
        return gradient
    low, high = limits
    return torch.ops.aten.hardtanh_backward(gradient, rectified, low, torch.inf if high is None else high)


def redirect(x: Tensor, limits: Limits) -> Tensor:
    """`x` between the limits, with a gradient that finds its way to dead units."""
    return _Redirected.apply(x, limits[1])


class Rectifying(nn.Module):
    """A module that holds a rectifier of its own, and must `redirect` in its place while `redirecting` is set."""

    def __init__(self, limits: Limits | None) -> None:
        super().__init__()
        self.limits, self.redirecting = limits, False


def silent(gradient: Tensor) -> Tensor:
    """(B, 1, …) bool: of which images nothing is left."""
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
        usual = passed(gradient, x, (0.0, ctx.high))
        # Mostly one rectifier is to blame; others need no second look, nor does a gradient that was nothing already.
        dead = silent(usual)
        if not bool(dead.any()) or not bool((dead := dead & ~silent(gradient)).any()):
            return usual, None
        low, above = x <= 0, torch.zeros_like(x, dtype=torch.bool) if ctx.high is None else x >= ctx.high
        # What is raised is the objective, so a positive gradient asks for more.
        wanted = gradient * ((low & (gradient > 0)) | (above & (gradient < 0)))
        return torch.where(dead, wanted, usual), None


def _redirecting(limits: Limits) -> Callable[[Tensor], Tensor]:
    """Return a forward with the parameter name of PyTorch's rectifiers, for networks that call them by keyword."""

    def forward(input: Tensor) -> Tensor:
        return redirect(input, limits)

    return forward


@contextlib.contextmanager
def redirected(module: nn.Module) -> Iterator[None]:
    """Rectifiers (nn.ReLU, nn.ReLU6, `Rectifying`) of `module` redirect gradients while this is entered."""
    changed: list[nn.Module] = []
    switched: list[Rectifying] = []

    try:
        for child in module.modules():
            if isinstance(child, Rectifying):
                child.redirecting = True
                switched.append(child)
            elif isinstance(child, (nn.ReLU, nn.ReLU6)) and "forward" not in vars(child):
                limits = (0.0, 6.0 if isinstance(child, nn.ReLU6) else None)
                child.forward = _redirecting(limits)  # type: ignore[method-assign]
                changed.append(child)
        yield
    finally:
        for child in changed:
            del child.forward
        for child in switched:
            child.redirecting = False
