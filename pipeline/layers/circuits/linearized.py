"""Gradients of a network that is made linear between two layers.

Inside `LinearGradients`, a network computes its usual values, but gradients pass as if it were linear:

- an activation function f multiplies by its *mean gate* E f′(z), where z is normally distributed with the mean β and
  the standard deviation |γ| that the batch normalization before it gives each channel over the training images (of a
  ReLU it is the probability of z > 0); without such a normalization the gate is 1;
- maximum pooling passes gradients as average pooling does;
- a gate such as the sigmoid of squeeze-and-excitation is a constant, with its value for the image at hand;
- a normalization by statistics of each image, and everything else, has its own gradient for the image at hand.

Attention, whose weights are products of values, is not linear in any useful sense: its softmax stops the gradient.
See Voss et al. 2021, "Visualizing Weights", section "Expanded weights"; there activation functions are left out.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.layers.tracing import kind_of, tensor_of

# Elementwise activation functions by name, without the underscore of variants in place.
ACTIVATIONS = frozenset(
    ("relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "silu", "gelu", "mish", "hardswish", "softplus")
)
# Functions whose results count as constants that other values are multiplied by.
GATES = frozenset(("sigmoid", "hardsigmoid", "logsigmoid"))
IMAGE_NORMS = frozenset(("layer_norm", "group_norm", "instance_norm", "rms_norm"))
MAX_POOLS = frozenset(("max_pool2d", "adaptive_max_pool2d"))
STOPS = frozenset(("softmax", "scaled_dot_product_attention", "multi_head_attention_forward"))
FUNCTION_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
OPERATOR_ARGUMENTS = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
# Points of the integral of a mean gate, in standard deviations on both sides of the mean, and their number.
RANGE, POINTS = 6.0, 401
# Standard deviations are taken as at least this: the gate of a constant channel is then the slope at its value.
LEAST_DEVIATION = 1e-3


@dataclasses.dataclass(frozen=True)
class Passed:
    """A module call that the values of the source pass through, or an operation inside one.

    Attributes:
        path: Path of the module.
        tensor: Its result.
        approximate: Whether it is linear only because something was held constant, or was replaced.
        mixes: Whether it is a convolution or linear layer.
        gated: Whether it is an activation function.
    """

    path: str
    tensor: Tensor
    approximate: bool = False
    mixes: bool = False
    gated: bool = False


class LinearGradients(TorchFunctionMode):
    """Passes gradients as if the network were linear; see the module.

    Attributes:
        passed: What gradients pass, in the order of computation.
        stopped: Whether an operation that depends on the source stops its gradient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passed: list[Passed] = []
        self.stopped = False
        self._paths: list[str] = []
        # Mean and standard deviation of each channel of the output of a batch normalization.
        self._moments = WeakTensorKeyDictionary()

    @contextlib.contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Know the paths of the modules of a network inside the block."""
        handles = []
        for path, child in module.named_modules():
            if isinstance(child, torch.jit.ScriptModule):
                continue
            handles.append(child.register_forward_pre_hook(self._enter(path)))
            handles.append(child.register_forward_hook(self._leave(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def before(*_: Any) -> None:
            self._paths.append(path)

        return before

    def _leave(self, path: str) -> Callable[..., None]:
        def after(module: nn.Module, _args: Any, output: Any) -> None:
            self._paths.pop()
            tensor = tensor_of(output)
            if tensor is not None and tensor.requires_grad and kind_of(module) in ("conv", "linear"):
                self.passed.append(Passed(path, tensor, mixes=True))

        return after

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function; gradients pass as described in the module."""
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", "")).partition(".")[0].removesuffix("_")
        tensor = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
        if name == "batch_norm":
            return self._batch_norm(func, args, kwargs)
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return func(*args, **kwargs)
        others = args[1:] if args else ()
        kwargs = {key: value for key, value in kwargs.items() if key != "input"}

        def value(x: Tensor) -> Any:
            return func(x, *others, **kwargs)

        if name in ACTIVATIONS:
            return self._activation(tensor, value)
        if name in GATES:
            # A leaf, so that a gradient tells whether the gate lies on the way to a later layer.
            return self._noted(value(tensor.detach().clone()).requires_grad_(), approximate=True)
        if name in STOPS:
            self.stopped = True
            return value(tensor.detach())
        if name in IMAGE_NORMS:
            return self._noted(value(tensor), approximate=True)
        if name in MAX_POOLS:
            return self._max_pool(name, tensor, value, others, kwargs)
        return value(tensor)

    def _noted(self, tensor: Tensor, approximate: bool = False, gated: bool = False) -> Tensor:
        self.passed.append(Passed(self._paths[-1] if self._paths else "", tensor, approximate, gated=gated))
        return tensor

    def _batch_norm(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output of a batch normalization; keep its mean β and standard deviation |γ| of each channel."""
        # The operator of exported programs has another order of arguments than the function.
        names = OPERATOR_ARGUMENTS if isinstance(func, torch._ops.OpOverload) else FUNCTION_ARGUMENTS
        given = dict(zip(names, args, strict=False)) | kwargs
        tensor, weight, bias, mean, variance = (given.get(name) for name in OPERATOR_ARGUMENTS[:5])
        if (
            given.get("training")
            or not isinstance(tensor, Tensor)
            or not isinstance(weight, Tensor)
            or not isinstance(bias, Tensor)
            or not isinstance(mean, Tensor)
            or not isinstance(variance, Tensor)
        ):
            return func(*args, **kwargs)
        # As a product and a sum: the backward pass of the operation itself is several times as slow in a batch.
        shape = (1, -1, *[1] * (tensor.dim() - 2))
        scale = weight.detach() * (variance + given.get("eps", 1e-5)).rsqrt()
        result = tensor * scale.reshape(shape) + (bias.detach() - mean * scale).reshape(shape)
        self._moments[result] = (bias.detach().double(), weight.detach().double().abs())
        return result

    def source(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return a leaf with the values of a tensor, and a copy of it that the network goes on with."""
        leaf = tensor.detach().requires_grad_()
        copy = leaf.clone()
        if tensor in self._moments:
            self._moments[copy] = self._moments[tensor]
        return leaf, copy

    def _activation(self, tensor: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
        """Return f(x), with the gradient of g · x, where g is the mean gate of each channel."""
        change = tensor - tensor.detach()
        moments = self._moments.get(tensor)
        # The function may change its argument in place.
        result = value(tensor.detach().clone())
        if moments is not None:
            change = change * mean_gate(value, *moments).to(tensor.dtype).reshape(1, -1, *[1] * (tensor.dim() - 2))
        return self._noted(result + change, gated=True)

    def _max_pool(
        self, name: str, tensor: Tensor, value: Callable[[Tensor], Any], others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = value(tensor.detach())
        if not isinstance(result, Tensor):
            return value(tensor)  # with indices: the gradient of the maximum
        change = tensor - tensor.detach()
        if name == "adaptive_max_pool2d":
            mean = functional.adaptive_avg_pool2d(change, (result.shape[-2], result.shape[-1]))
        else:
            names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
            settings = dict(zip(names, others, strict=False)) | kwargs
            if settings.get("dilation", 1) not in (1, (1, 1), [1, 1]):
                return value(tensor)
            mean = functional.avg_pool2d(
                change,
                settings["kernel_size"],
                settings.get("stride") or None,
                settings.get("padding", 0),
                settings.get("ceil_mode", False),
                count_include_pad=False,
            )
        return self._noted(result + mean, approximate=True)


def mean_gate(function: Callable[[Tensor], Tensor], mean: Tensor, deviation: Tensor) -> Tensor:
    """Return E f′(z) for normally distributed z of each channel, (C,) float64.

    By Stein's lemma it is E f(z) (z − μ) ÷ σ², which needs no derivative.

    Args:
        function: f, elementwise.
        mean: μ, (C,) float64.
        deviation: σ, (C,) float64.
    """
    points = torch.linspace(-RANGE, RANGE, POINTS, dtype=torch.float64, device=mean.device)[:, None]
    weights = torch.exp(-0.5 * points**2)
    deviation = deviation.clamp(min=LEAST_DEVIATION)
    with torch.no_grad():
        values = function((mean + deviation * points).contiguous())
    return (weights * points * values).sum(0) / (weights * points**2).sum() / deviation
