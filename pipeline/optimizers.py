"""How parameters follow the gradient. State and step sizes are per picture: nothing couples a batch."""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pipeline.registry import Registry

OPTIMIZERS = Registry("optimizer")


@runtime_checkable
class Optimizer(Protocol):
    """What `render` needs of an optimiser."""

    def start(self, parameters: Tensor) -> Any:
        """State before the first step."""
        ...

    def step(self, parameters: Tensor, gradient: Tensor, state: Any, at: int, of: int, scale: float) -> None:
        """Move `parameters` (B, …) in place, *up* the gradient; step `at` (0-based) `of` all, times `scale`."""
        ...


@OPTIMIZERS.add("adam")
@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam (Kingma & Ba 2015) with warm-up, cosine decay, and an epsilon relative to each picture's gradient.

    `damping` is that epsilon, as a share of the root mean square of the picture's own second moment. Plain
    Adam steps every Fourier coefficient by the full learning rate at first, however small its gradient; where
    gradients are coherent (a unit that wants one plain colour) these steps add up to spikes at the canvas's
    corner that saturate the sigmoid for good. 0.03 removes them; 0 is plain Adam.
    `floor` is the last learning rate as a share of the first.
    """

    lr: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    damping: float = 0.0
    warmup: int = 0
    floor: float = 1.0

    def rate(self, at: int, of: int) -> float:
        """Learning rate of step `at` (0-based) of `of`."""
        if at < self.warmup:
            return self.lr * (at + 1) / (self.warmup + 1)
        progress = (at - self.warmup) / max(1, of - self.warmup)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    def start(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """First and second moment, zero."""
        return torch.zeros_like(parameters), torch.zeros_like(parameters)

    @torch.no_grad()
    def step(self, parameters: Tensor, gradient: Tensor, state: Any, at: int, of: int, scale: float) -> None:
        """One Adam step up the gradient, in place."""
        first, second = state
        first.lerp_(gradient, 1 - self.beta1)
        second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        corrected = second / (1 - self.beta2 ** (at + 1))
        mean_square = corrected.mean(dim=tuple(range(1, corrected.ndim)), keepdim=True)
        denominator = corrected.sqrt_().add_(self.damping * mean_square.sqrt() + 1e-8)
        rate = scale * self.rate(at, of) / (1 - self.beta1 ** (at + 1))
        parameters.addcdiv_(first, denominator, value=rate)
