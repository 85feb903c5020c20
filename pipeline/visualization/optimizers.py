"""How parameters follow the gradient. State and step sizes are per picture: nothing couples a batch."""

import ctypes
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.core.errors import AtlasError
from pipeline.core.registry import Registry
from pipeline.kernels import build

OPTIMIZERS = Registry("optimizer")

# Ways from 1 to 0, over a progress from 0 to 1.
FALLS: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What every optimiser shares: a learning rate that is warmed up over `warmup` steps and then falls.

    `fall` is the way, cosine or linear; `floor` the last learning rate as a share of the first: 1 keeps it constant.
    """

    lr: float = 0.05
    warmup: int = 0
    floor: float = 1.0
    fall: str = "cosine"

    def check(self) -> None:
        """Raise `AtlasError` for settings that make no sense."""
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise AtlasError(f"render.optimizer.lr={self.lr} must be above 0.")
        if self.fall not in FALLS:
            raise AtlasError(f"render.optimizer.fall={self.fall!r} is not one of {', '.join(FALLS)}.")

    def rate(self, at: int, of: int) -> float:
        """Learning rate of step `at` (0-based) of `of`."""
        if at < self.warmup:
            return self.lr * (at + 1) / (self.warmup + 1)
        progress = (at - self.warmup) / max(1, of - self.warmup)
        return self.lr * (self.floor + (1 - self.floor) * FALLS[self.fall](progress))

    def start(self, parameters: Tensor, paired: bool = False) -> tuple[Tensor, ...]:
        """State before the first step, picture by picture.

        `paired` says that the last axis of `parameters` (B, …) holds the real and imaginary part of a number.
        """
        raise NotImplementedError

    def step(self, parameters: Tensor, gradient: Tensor, state: Any, at: int, rate: float) -> None:
        """Move `parameters` (B, …) in place, *up* the gradient, by `rate`; `at` (0-based) counts from `start`."""
        raise NotImplementedError


@functools.cache
def _adam() -> Callable[..., None] | None:
    """optimizers.c: four tensors, three sizes and seven numbers; None where it can't be compiled."""
    library = build.library("adam")
    if library is None:
        return None
    library.adam.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_ssize_t] * 3 + [ctypes.c_float] * 7
    library.adam.restype = None
    return library.adam


@OPTIMIZERS.add("adam")
@dataclasses.dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma & Ba 2015) with an epsilon relative to each picture's gradient.

    `damping` is that epsilon, as a share of the root mean square of the picture's own second moment. Plain
    Adam steps every Fourier coefficient by the full learning rate at first, however small its gradient; where
    gradients are coherent (a unit that wants one plain colour) these steps add up to spikes at the canvas's
    corner that saturate the sigmoid for good. 0.03 removes them; 0 is plain Adam.

    With `joint` the real and imaginary part of a Fourier coefficient share one second moment. Moving a picture turns
    one into the other, so that plain Adam's steps depend on where the picture's corner is; these do not. It also
    halves what shaking makes the second moment waver by.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    damping: float = 0.0
    joint: bool = False

    nesterov: ClassVar[bool] = False

    def start(self, parameters: Tensor, paired: bool = False) -> tuple[Tensor, ...]:
        """First and second moment, zero; the last axis of the second is 1 where both parts have it jointly."""
        second = parameters[..., :1] if paired and self.joint else parameters
        return torch.zeros_like(parameters), torch.zeros_like(second, memory_format=torch.contiguous_format)

    @torch.no_grad()
    def step(self, parameters: Tensor, gradient: Tensor, state: Any, at: int, rate: float) -> None:
        """One Adam step up the gradient, in place."""
        first, second = state
        # The second moment's own bias is a factor of everything below the line: it goes into the rate.
        shrunk = math.sqrt(1 - self.beta2 ** (at + 1))
        least = 1e-8 * shrunk
        bias = 1 - self.beta1 ** (at + 1)
        ahead, now = 1.0, 0.0
        if self.nesterov:
            # Dozat 2016, equation 8 with a constant momentum: the gradient's own part is not delayed.
            ahead, now = self.beta1 * bias / (1 - self.beta1 ** (at + 2)), 1 - self.beta1
        rate_now = rate / bias * shrunk
        self.shrink(parameters, rate)
        loop = _adam() if parameters.device.type == "cpu" else None
        tensors = (parameters, gradient, first, second)
        if loop is not None and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors):
            numbers = (self.beta1, self.beta2, ahead, now, self.damping, least, rate_now)
            together = first.numel() // second.numel()
            loop(*(t.data_ptr() for t in tensors), len(parameters), second[0].numel(), together, *numbers)
            return
        first.lerp_(gradient, 1 - self.beta1)
        square = gradient * gradient
        if second.shape != first.shape:
            square = square.mean(-1, keepdim=True)
        second.lerp_(square, 1 - self.beta2)
        mean_square = second.mean(dim=tuple(range(1, second.ndim)), keepdim=True)
        denominator = second.sqrt().add_(self.damping * mean_square.sqrt() + least)
        direction = first * ahead + gradient * now if self.nesterov else first
        parameters.addcdiv_(direction, denominator, value=rate_now)

    def shrink(self, parameters: Tensor, rate: float) -> None:
        """Weight decay, where there is any."""


@OPTIMIZERS.add("adamw")
@dataclasses.dataclass(frozen=True)
class AdamW(Adam):
    """Adam that shrinks the parameters by rate × `weight_decay` at each step (Loshchilov & Hutter 2019)."""

    weight_decay: float = 0.01

    def shrink(self, parameters: Tensor, rate: float) -> None:
        """Decoupled from the gradient."""
        parameters.mul_(1 - rate * self.weight_decay)


@OPTIMIZERS.add("nadam")
@dataclasses.dataclass(frozen=True)
class NAdam(Adam):
    """Adam with Nesterov's momentum (Dozat 2016), which Horama and Xplique use."""

    nesterov: ClassVar[bool] = True


@OPTIMIZERS.add("sgd")
@dataclasses.dataclass(frozen=True)
class Sgd(Optimizer):
    """Steps of rate × gradient ÷ its own mean magnitude, image by image, as DeepDream and deepdraw do."""

    momentum: float = 0.0

    def start(self, parameters: Tensor, paired: bool = False) -> tuple[Tensor, ...]:
        """The momentum, zero."""
        return (torch.zeros_like(parameters),)

    @torch.no_grad()
    def step(self, parameters: Tensor, gradient: Tensor, state: Any, at: int, rate: float) -> None:
        """One step up the normalised gradient, in place."""
        (velocity,) = state
        size = gradient.abs().mean(dim=tuple(range(1, gradient.ndim)), keepdim=True)
        velocity.mul_(self.momentum).add_(gradient / size.clamp(min=torch.finfo(size.dtype).tiny))
        parameters.add_(velocity, alpha=rate)
