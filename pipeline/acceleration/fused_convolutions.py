"""Convolutions of cuDNN that add the bias, add a residual and apply ReLU before they write a value.

On a GPU these three are kernels of their own in PyTorch, and most of the time of a step is their memory traffic.
Whether the convolution of cuDNN with all of them is faster depends on the shape, so it is measured once per shape in
the process; it is also compared with plain PyTorch there, and never used for a shape where it fails or deviates. On
other devices plain PyTorch runs. The gradient is computed in the same way.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.acceleration.batchnorm_folding import only_argument, plain_forward
from pipeline.acceleration.redirected_relu import FusedRectifier, redirect
from pipeline.core.errors import first_line
from pipeline.kernels.device_errors import is_device_failure
from pipeline.kernels.triton_check import on_device_of
from pipeline.kernels.types import PassRange

log = logging.getLogger(__name__)

_T = TypeVar("_T")

RELU: PassRange = (0.0, None)

# Convolutions with fewer input channels or larger kernels, such as the first of a network, are not fused: for 7 × 7 and
# 3 channels the fused one is 17 times as slow in channels-last format (pytorch#68506).
MIN_CHANNELS, MAX_KERNEL = 5, 5

# Calls for each of `ROUNDS` measurements, of which the fastest counts.
CALLS, ROUNDS = 5, 3

# Largest difference between a fused and a plain convolution, relative to the norm of the plain one.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
TF32_TOLERANCE = 5e-3


class ConvGeometry(NamedTuple):
    """Stride, padding and dilation, each (vertical, horizontal), and the number of groups of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _Operands(NamedTuple):
    """Input (B, C, H, W), residual (B, C', H', W') or None, weights, bias and geometry of a convolution."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor | None
    geometry: ConvGeometry


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """Return relu(convolution(x) + bias); the gradient is propagated to `x` only."""
    return _ConvRelu.apply(x, None, weight, bias, geometry)


def conv_add_relu(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry) -> Tensor:
    """Return relu(convolution(x) + bias + residual); the gradient is propagated to `x` and `residual`."""
    return _ConvRelu.apply(x, residual, weight, bias, geometry)


class _ConvRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry
    ) -> Tensor:
        y = _rectified(_Operands(x, residual, weight, bias, geometry))
        ctx.weight, ctx.geometry = weight, geometry
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, y = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(grads[0], y, 0)  # as the gradient of nn.ReLU
        input_gradient = None
        if ctx.needs_input_grad[0]:
            stride, padding, dilation, groups = ctx.geometry
            input_gradient = torch.ops.aten.convolution_backward(
                gradient,
                x,
                ctx.weight,
                None,  # bias
                stride,
                padding,
                dilation,
                False,  # transposed
                (0, 0),  # output padding
                groups,
                (True, False, False),  # gradient of the input only
            )[0]
        return input_gradient, gradient if ctx.needs_input_grad[1] else None, None, None, None


def _plain(operands: _Operands) -> Tensor:
    """Compute with PyTorch, on any device."""
    x, residual, weight, bias, geometry = operands
    y = F.conv2d(x, weight, bias, *geometry)
    return (y if residual is None else y.add_(residual)).relu_()


def _fused(operands: _Operands) -> Tensor:
    """Compute with cuDNN."""
    x, residual, weight, bias, geometry = operands
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


# Whether the fused convolution is used, by `_key`, and whether a failure was logged.
_choices: dict[tuple[Any, ...], bool] = {}
_failures: set[str] = set()


def _rectified(operands: _Operands) -> Tensor:
    """Compute in the faster way."""
    if not _can_fuse(operands):
        return _plain(operands)
    key = _key(operands)
    if key not in _choices:
        # Measurements wait for the device, which is an error while a CUDA graph is captured.
        if torch.cuda.is_current_stream_capturing():
            return _plain(operands)
        _choices[key] = _tried(lambda: _is_faster(operands), key) is True
    if _choices[key]:
        y = _tried(lambda: _fused(operands), key)
        if y is not None:
            return y
        _choices[key] = False
    return _plain(operands)


def _tried(function: Callable[[], _T], key: tuple[Any, ...]) -> _T | None:
    """Call a function that runs the fused convolution; return None and log the error if it raises one."""
    try:
        return function()
    except Exception as error:
        if is_device_failure(error):
            raise
        # One line for all shapes: usually it is the version of cuDNN.
        level = logging.DEBUG if _failures else logging.WARNING
        _failures.add(str(key))
        log.log(
            level,
            "a convolution of cuDNN with ReLU failed (%s), a plain one is used: batch, input, weights, … = %s",
            first_line(error),
            key,
        )
        return None


def _can_fuse(operands: _Operands) -> bool:
    """Return whether the fused convolution may be tried."""
    x, residual, weight, _, _ = operands
    # PyTorch lets the fused convolutions of cuDNN be nondeterministic, whatever its settings.
    deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    if not x.is_cuda or deterministic or not torch.backends.cudnn.enabled:
        return False
    if x.dtype != weight.dtype or x.dtype not in TOLERANCES:
        return False
    if residual is None:
        return True
    # cuDNN gives wrong results if the residual is the input (pytorch#62926).
    return residual.dtype == x.dtype and residual.data_ptr() != x.data_ptr()


def _key(operands: _Operands) -> tuple[Any, ...]:
    """Return what the choice depends on.

    Batches up to the next power of two share a choice, because the last batch of a layer may have any size.
    """
    x, residual, weight, bias, geometry = operands
    batch = 1 << (len(x) - 1).bit_length()
    kind = (x.dtype, x.device, _allows_tf32(x.dtype))
    return batch, tuple(x.shape[1:]), tuple(weight.shape), bias is None, residual is None, geometry, kind


def _allows_tf32(dtype: torch.dtype) -> bool:
    """Return whether cuDNN may round the operands of float32 convolutions to TF32."""
    if dtype != torch.float32:
        return False
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        # It can't be read after the newer setting of one operator was changed.
        return torch.backends.cudnn.conv.fp32_precision != "ieee"  # type: ignore[attr-defined]


@torch.no_grad()
def _is_faster(operands: _Operands) -> bool:
    """Return whether the fused convolution is faster than the plain one.

    Raises:
        ValueError: If their values differ.
    """
    with on_device_of(operands.x):
        _check_values(operands, _plain(operands))
        fused, plain = (
            min(times)
            for times in zip(
                *((_milliseconds(_fused, operands), _milliseconds(_plain, operands)) for _ in range(ROUNDS)),
                strict=True,
            )
        )
    log.debug("convolution with ReLU, %s: %.3f ms fused, %.3f ms plain", _key(operands), fused, plain)
    return fused < plain


def _check_values(operands: _Operands, expected: Tensor) -> None:
    """Compare a fused convolution with the `expected` values.

    Without a residual, PyTorch passes the output, times 0, in its place: memory that was not written yet. If cuDNN read
    it, NaN there would reach the result, or 0 in place of it. Therefore the output gets memory that contains NaN.

    Raises:
        ValueError: If they differ, or if the output did not get that memory.
    """
    memory = torch.full_like(expected, torch.nan)
    address = memory.data_ptr()
    del memory
    found = _fused(operands)
    if operands.residual is None and found.data_ptr() != address:
        raise ValueError("its use of memory can't be tested")
    tolerance = TF32_TOLERANCE if _allows_tf32(expected.dtype) else TOLERANCES[expected.dtype]
    difference = (found.float() - expected.float()).norm()
    # Not `>`: NaN is a difference too.
    if not bool(difference <= tolerance * expected.float().norm() + 1e-12):
        raise ValueError("its values differ from those of PyTorch")


def _milliseconds(function: Callable[[_Operands], Tensor], operands: _Operands) -> float:
    """Return the time of `CALLS` calls on the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(CALLS):
        function(operands)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


# Attribute of a map that a ReLU was applied to: its version. A module that changes the map in place raises the version.
_RECTIFIED = "_rectified_version"


def _mark_rectified(maps: Tensor) -> Tensor:
    """Mark maps as the result of a ReLU, for `SkippingReLU`."""
    if not maps.is_inference():  # tensors of the inference mode have no version
        setattr(maps, _RECTIFIED, maps._version)
    return maps


class FusedConv2d(FusedRectifier):
    """A convolution and the ReLU after it; the module that was the ReLU becomes a `SkippingReLU`.

    Args:
        conv: The convolution that is replaced, which `is_fusible`; its weight and bias are shared.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(RELU)
        assert not isinstance(conv.padding, str)
        self.weight, self.bias = conv.weight, conv.bias
        self.geometry = ConvGeometry(conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W'). The parameter can have any name, like that of the replaced module."""
        # Under autocast the data type of the input may differ from that of the weights.
        x = only_argument(args, kwargs).to(self.weight.dtype)
        if self.redirecting:
            return _mark_rectified(redirect(F.conv2d(x, self.weight, self.bias, *self.geometry), RELU))
        return _mark_rectified(conv_relu(x, self.weight, self.bias, self.geometry))


class JoiningConv2d(FusedConv2d):
    """The last convolution of a residual block, with the sum and the ReLU after it."""

    def join(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return relu(convolution(x) + residual), or the sum without ReLU while gradients are redirected."""
        x = x.to(self.weight.dtype)
        if self.redirecting:
            return F.conv2d(x, self.weight, self.bias, *self.geometry) + residual
        return _mark_rectified(conv_add_relu(x, residual, self.weight, self.bias, self.geometry))


class SkippingReLU(FusedRectifier):
    """A ReLU that returns maps unchanged if a `FusedConv2d` applied ReLU to them already."""

    def __init__(self) -> None:
        super().__init__(RELU)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        x = only_argument(args, kwargs)
        version = getattr(x, _RECTIFIED, None)
        if version is not None and version == x._version:
            return x
        return redirect(x, RELU) if self.redirecting else F.relu(x)


def is_fusible(module: nn.Module) -> bool:
    """Return whether a module is a convolution that `FusedConv2d` can replace."""
    # A subclass may change its weights before it uses them.
    if type(module) is not nn.Conv2d or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return False
    small = module.in_channels >= MIN_CHANNELS and max(module.kernel_size) <= MAX_KERNEL
    return small and plain_forward(module) and module.weight.dtype in TOLERANCES
