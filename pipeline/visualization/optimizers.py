"""Optimizers. State and step sizes are separate for each image: the images of a batch stay independent."""

import ctypes
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.core.registry import Registry
from pipeline.kernels import adam, build

OPTIMIZERS = Registry("optimizer")

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fall = Literal["cosine", "linear"]

# Decay from 1 to 0 as the progress goes from 0 to 1.
FALLS: Mapping[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Base class of optimizers, with a learning rate that is warmed up linearly and then decays.

    Attributes:
        lr: Learning rate after the warm-up.
        warmup: Number of warm-up steps.
        floor: Final learning rate as a fraction of `lr`; 1 keeps it constant.
        fall: Shape of the decay, "cosine" or "linear".
    """

    lr: Rate = 0.05
    warmup: int = 0
    floor: float = 1.0
    fall: Fall = "cosine"

    def rate(self, step: int, num_steps: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / (self.warmup + 1)
        progress = (step - self.warmup) / max(1, num_steps - self.warmup)
        return self.lr * (self.floor + (1 - self.floor) * FALLS[self.fall](progress))

    def init_state(self, parameters: Tensor, paired: bool = False) -> tuple[Tensor, ...]:
        """Return the state before the first step.

        Args:
            parameters: (B, …).
            paired: Whether the last axis of the parameters holds real and imaginary parts.

        Returns:
            Tensors whose first axis is that of the batch.
        """
        raise NotImplementedError

    def step(self, parameters: Tensor, gradient: Tensor, state: Any, step: int, rate: float) -> None:
        """Move the parameters *up* the gradient, in place.

        Args:
            parameters: (B, …).
            gradient: (B, …).
            state: The state from `init_state`; updated in place.
            step: Number of steps since `init_state`.
            rate: Learning rate.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TabulatedOptimizer(Optimizer):
    """Base class of optimizers whose steps differ only in a few numbers.

    The numbers of all steps can lie in a table on the device, so that a GPU repeats one captured step (see
    `captured_steps`). A subclass that overrides `step` itself is run step by step.
    """

    def numbers(self, step: int, rate: float) -> tuple[float, ...]:
        """Return the numbers of a step; the arguments are those of `step`."""
        raise NotImplementedError

    def apply(self, parameters: Tensor, gradient: Tensor, state: Any, numbers: Sequence[float] | Tensor) -> None:
        """Make the step of some `numbers`, in place; a tensor of them is on the device of the parameters."""
        raise NotImplementedError

    def prepare(self, parameters: Tensor, state: Any) -> None:
        """Prepare what `apply` with a tensor of numbers cannot do while it is captured; nothing by default."""

    def step(self, parameters: Tensor, gradient: Tensor, state: Any, step: int, rate: float) -> None:
        """Make one step up the gradient, in place."""
        self.apply(parameters, gradient, state, self.numbers(step, rate))

    @property
    def is_tabulated(self) -> bool:
        """Whether `apply` makes the steps of this class."""
        return type(self).step is TabulatedOptimizer.step


@functools.cache
def _adam() -> Callable[..., None] | None:
    """Return the compiled step of adam.c (four pointers, three sizes, seven floats); None if it cannot be compiled."""
    library = build.load_library("adam")
    if library is None:
        return None
    library.adam.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_ssize_t] * 3 + [ctypes.c_float] * 7
    library.adam.restype = None
    return library.adam


@OPTIMIZERS.add("adam")
@dataclasses.dataclass(frozen=True)
class Adam(TabulatedOptimizer):
    """Adam (Kingma & Ba 2015) with an epsilon relative to the gradient of each image.

    `damping` is that epsilon, as a fraction of the square root of the image's mean second moment. The first steps of
    plain Adam change every Fourier coefficient by the full learning rate, however small its gradient. Where gradients
    are coherent (a unit that prefers a plain color), these steps add up to spikes at the corner of the image that
    saturate the sigmoid permanently. 0.03 removes them; 0 is plain Adam.

    With `joint` the real and the imaginary part of a Fourier coefficient share one second moment. Translating an image
    rotates one into the other, so that the steps of plain Adam depend on the position of the origin; these do not. It
    also halves the fluctuation of the second moment that transformations cause.
    """

    # A larger one is better in early layers, a smaller one in the last, by about a percent per 0.02.
    lr: Rate = 0.11
    warmup: int = 8
    floor: float = 0.05
    # "cosine": 1 % less activation.
    fall: Fall = "linear"
    # The best of 0.9, 0.7, 0.5 and 0.3 over five layers: with random transformations long memory helps little. The
    # second moment has a shorter memory than 0.999, as there are few steps. Both: 8 to 15 % more activation.
    beta1: float = 0.5
    beta2: float = 0.9
    damping: float = 0.03
    # 1.3 % more activation, 2 % in the last layers.
    joint: bool = True

    nesterov: ClassVar[bool] = False

    def init_state(self, parameters: Tensor, paired: bool = False) -> tuple[Tensor, ...]:
        """Return the first and the second moment, 0; with `joint` the last axis of the second has size 1."""
        second = parameters[..., :1] if paired and self.joint else parameters
        return torch.zeros_like(parameters), torch.zeros_like(second, memory_format=torch.contiguous_format)

    def numbers(self, step: int, rate: float) -> tuple[float, ...]:
        """Return β₁, β₂, the factors of first moment and gradient, damping, ε, step size, and what decay leaves."""
        # The bias correction of the second moment is a factor of the whole denominator: it goes into the step size.
        bias2 = math.sqrt(1 - self.beta2 ** (step + 1))
        epsilon = 1e-8 * bias2
        bias1 = 1 - self.beta1 ** (step + 1)
        moment_factor, gradient_factor = 1.0, 0.0
        if self.nesterov:
            # Dozat 2016, equation 8 with a constant momentum: the present gradient contributes without delay.
            moment_factor = self.beta1 * bias1 / (1 - self.beta1 ** (step + 2))
            gradient_factor = 1 - self.beta1
        step_size = rate / bias1 * bias2
        kept = 1 - rate * self.decay
        return self.beta1, self.beta2, moment_factor, gradient_factor, self.damping, epsilon, step_size, kept

    @torch.no_grad()
    def apply(self, parameters: Tensor, gradient: Tensor, state: Any, numbers: Sequence[float] | Tensor) -> None:
        """Make one Adam step up the gradient, in place."""
        first, second = state
        tensors = (parameters, gradient, first, second)
        if self.decay:
            parameters.mul_(numbers[7])
        if isinstance(numbers, Tensor):
            adam.step(*tensors, numbers)
            return
        _, _, moment_factor, gradient_factor, _, epsilon, step_size, _ = numbers
        compiled = _adam() if parameters.device.type == "cpu" else None
        if compiled is not None and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors):
            joint_size = first.numel() // second.numel()
            compiled(*(t.data_ptr() for t in tensors), len(parameters), second[0].numel(), joint_size, *numbers[:7])
            return
        first.lerp_(gradient, 1 - self.beta1)
        square = gradient * gradient
        if second.shape != first.shape:
            square = square.mean(-1, keepdim=True)
        second.lerp_(square, 1 - self.beta2)
        mean_square = second.mean(dim=tuple(range(1, second.ndim)), keepdim=True)
        denominator = second.sqrt().add_(self.damping * mean_square.sqrt() + epsilon)
        direction = first * moment_factor + gradient * gradient_factor if self.nesterov else first
        parameters.addcdiv_(direction, denominator, value=step_size)

    def prepare(self, parameters: Tensor, state: Any) -> None:
        """Compile the kernels of a step whose numbers are a tensor."""
        adam.prepare(parameters, *state)

    @property
    def decay(self) -> float:
        """Weight decay by a step with a rate of 1; there is none by default."""
        return 0.0


@OPTIMIZERS.add("adamw")
@dataclasses.dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay: parameters × (1 - rate × `weight_decay`) (Loshchilov & Hutter 2019)."""

    lr: Rate = 0.1
    fall: Fall = "cosine"
    beta1: float = 0.9
    beta2: float = 0.99
    joint: bool = False
    weight_decay: float = 0.01

    @property
    def decay(self) -> float:
        """The weight decay."""
        return self.weight_decay


@OPTIMIZERS.add("nadam")
@dataclasses.dataclass(frozen=True)
class NAdam(Adam):
    """Adam with Nesterov momentum (Dozat 2016), as Horama and Xplique use."""

    lr: Rate = 0.1
    fall: Fall = "cosine"
    beta1: float = 0.9
    beta2: float = 0.99
    joint: bool = False

    nesterov: ClassVar[bool] = True


@OPTIMIZERS.add("sgd")
@dataclasses.dataclass(frozen=True)
class Sgd(TabulatedOptimizer):
    """Steps of rate × gradient ÷ mean absolute gradient of the image, as DeepDream and deepdraw do."""

    lr: Rate = 0.043  # 11 gray levels
    momentum: float = 0.0

    def init_state(self, parameters: Tensor, paired: bool = False) -> tuple[Tensor, ...]:
        """Return the velocity, 0."""
        return (torch.zeros_like(parameters),)

    def numbers(self, step: int, rate: float) -> tuple[float, ...]:
        """Return the rate."""
        return (rate,)

    @torch.no_grad()
    def apply(self, parameters: Tensor, gradient: Tensor, state: Any, numbers: Sequence[float] | Tensor) -> None:
        """Make one step up the normalized gradient, in place."""
        (velocity,), rate = state, numbers[0]
        magnitude = gradient.abs().mean(dim=tuple(range(1, gradient.ndim)), keepdim=True)
        velocity.mul_(self.momentum).add_(gradient / magnitude.clamp(min=torch.finfo(magnitude.dtype).tiny))
        if isinstance(rate, Tensor):
            parameters.add_(velocity * rate)
        else:
            parameters.add_(velocity, alpha=rate)
