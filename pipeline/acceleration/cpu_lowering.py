"""Replace the convolutions of a folded network by faster ones for the optimization steps on a CPU.

The network computes the same function up to rounding. A step is limited by memory bandwidth and by kernels of PyTorch
that are not optimized, so these convolutions are replaced:

* A 1 × 1 convolution is a matrix product over the rows of a channels-last map (`Pointwise`).
* The gradient of a depthwise convolution is computed as a depthwise convolution of the gradient, dilated by the stride,
  with the flipped kernel (`Depthwise`). The kernel of PyTorch for it is a reference loop in bfloat16 and slow in
  float32. With a stride, and for the gradient of the first convolution (`FirstConv`), which has few input channels,
  there are compiled loops in `kernels.strided_conv_backward`.
* The rectifier after a folded normalization becomes part of the convolution: oneDNN applies it before it writes a
  value. Without oneDNN it is applied in place.

bfloat16 halves the memory traffic, and processors with instructions for it multiply two times (AVX512_BF16, vectors) to
eight times (AMX, tiles) as fast. Metrics of finished visualizations are always computed in float32.
"""

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from pipeline.acceleration.batchnorm_folding import (
    NORM_FORWARDS,
    ConvNormPair,
    FoldedNorm,
    copy_network,
    only_argument,
    plain_forward,
)
from pipeline.acceleration.redirected_relu import FusedRectifier, PassRange, limits_of, rectifier_gradient, redirect
from pipeline.core.errors import first_line
from pipeline.kernels import strided_conv_backward
from pipeline.models.loading import Model

log = logging.getLogger(__name__)


def lower(
    folded: Model,
    pairs: Sequence[ConvNormPair],
    dtype: torch.dtype = torch.float32,
    mixed: bool = False,
    visible: Collection[str] = (),
) -> Model:
    """Return a copy of a folded network in `dtype`, on a CPU with faster convolutions.

    Args:
        folded: The network; it is not changed.
        pairs: The result of `foldable_pairs`. Pairs that were not folded, because a layer is read inside, stay
            unchanged.
        dtype: Data type of weights and activations. Tensors that have it already are shared.
        mixed: Whether to run under autocast, for networks that create float32 tensors in their forward pass or use
            operators that need them.
        visible: Paths of folded normalizations whose output is read: a rectifier after them stays a module.
    """
    on_cpu = folded.device.type == "cpu"
    if not on_cpu and dtype == torch.float32:
        return folded
    model = in_precision(folded, dtype, exact_norms=not on_cpu)
    # The replacements need the channels-last memory format.
    if on_cpu and folded.channels_last:
        _replace_convolutions(model.module, dict(pairs), visible)
    if mixed:
        _run_mixed(model.module, dtype)
    return model


def in_precision(model: Model, dtype: torch.dtype, exact_norms: bool = False) -> Model:
    """Return a copy of a network with weights, buffers and input in `dtype`; tensors of this type are shared.

    Args:
        model: The network; it is not changed.
        dtype: Data type of weights, buffers and activations.
        exact_norms: Whether batch normalizations keep weights and statistics in float32. Their maps are in `dtype` all
            the same, and they lose no time on a GPU.
    """
    kept = _norm_tensors(model.module) if exact_norms else frozenset()
    module = copy_network(model.module, lambda tensor: tensor if id(tensor) in kept else _convert(tensor, dtype))
    if dtype != torch.float32:

        def cast_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            def cast(x: Any) -> Any:
                return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

            return tuple(map(cast, args)), {key: cast(x) for key, x in kwargs.items()}

        module.register_forward_pre_hook(cast_inputs, with_kwargs=True)
    return dataclasses.replace(model, module=module)


def _norm_tensors(module: nn.Module) -> frozenset[int]:
    """Return the ids of weights and statistics of batch normalizations that accept maps of another data type."""
    norms = [norm for norm in module.modules() if type(norm).forward in NORM_FORWARDS]
    return frozenset(id(tensor) for norm in norms for tensor in (*norm.parameters(False), *norm.buffers(False)))


def _run_mixed(module: nn.Module, dtype: torch.dtype) -> None:
    """Make a module run its forward pass under autocast."""
    forward, device = module.forward, next(module.parameters()).device.type

    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype):
            return forward(*args, **kwargs)

    module.forward = autocast  # type: ignore[method-assign]


def _replace_convolutions(module: nn.Module, norms: Mapping[str, str], visible: Collection[str]) -> None:
    """Replace the convolutions of `module` in place.

    Args:
        module: The network.
        norms: Paths of folded normalizations by that of the convolution.
        visible: See `lower`.
    """
    for path, conv in list(module.named_modules()):
        replacement = _replacement_class(conv)
        if replacement is None or not path:
            continue
        norm = module.get_submodule(norms[path]) if path in norms else None
        limits = None
        if isinstance(norm, FoldedNorm) and isinstance(norm.drop, nn.Identity) and norms[path] not in visible:
            limits = limits_of(norm.act)
            if limits is not None:
                norm.act = nn.Identity()
        parent, _, name = path.rpartition(".")
        assert isinstance(conv, nn.Conv2d)
        setattr(module.get_submodule(parent), name, replacement(conv, limits).eval())


def _convert(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a parameter, buffer or other tensor in `dtype`; the same tensor for float32."""
    if dtype == torch.float32 or not tensor.is_floating_point():
        return tensor
    converted = tensor.detach().to(dtype)
    return nn.Parameter(converted, requires_grad=False) if isinstance(tensor, nn.Parameter) else converted


def _replacement_class(module: nn.Module) -> "type[LoweredConv2d] | None":
    """Return the class that replaces a module; None if there is none for it."""
    # A subclass may change its weights before it uses them; timm's Conv2dSame only pads.
    if type(module) not in (nn.Conv2d, Conv2dSame):
        return None
    assert isinstance(module, nn.Conv2d)
    if module.padding_mode != "zeros" or isinstance(module.padding, str) or not plain_forward(module):
        return None
    if not module.weight.is_floating_point() or module.weight.dtype == torch.float64:
        return None
    if isinstance(module, Conv2dSame) and module.dilation != (1, 1):
        return None
    if module.kernel_size == (1, 1) and module.stride == (1, 1) and module.groups == 1 and module.padding == (0, 0):
        return Pointwise
    extent = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    padding_fits = all(p <= e for p, e in zip(module.padding, extent, strict=True))
    if module.groups == module.in_channels == module.out_channels > 1 and padding_fits:
        return Depthwise
    is_first = module.groups == 1 and module.in_channels <= MAX_FIRST_CHANNELS
    if is_first and module.dilation == (1, 1) and padding_fits:
        return FirstConv
    return None


# A number for each axis of a map: (vertical, horizontal).
Pair2d = tuple[int, int]

# Largest number of input channels of `FirstConv`: with more, the gradient of PyTorch is fast.
MAX_FIRST_CHANNELS = 4


class LoweredConv2d(FusedRectifier):
    """A convolution and the rectifier after it.

    Args:
        conv: The convolution that is replaced; its weight and bias are shared.
        limits: Limits of the rectifier; None if there is none.
    """

    def __init__(self, conv: nn.Conv2d, limits: PassRange | None) -> None:
        super().__init__(limits)
        self.weight, self.bias = conv.weight, conv.bias

    def convolve(self, x: Tensor, limits: PassRange | None) -> Tensor:
        """Apply the convolution, and a rectifier with `limits` if they are not None."""
        raise NotImplementedError

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W'). The parameter can have any name, like that of the replaced module."""
        # Under autocast the data type of the input may differ from that of the weights.
        x = only_argument(args, kwargs).to(self.weight.dtype)
        if self.redirecting and self.limits is not None:
            return redirect(self.convolve(x, None), self.limits)
        return self.convolve(x, self.limits)


def _can_fuse_rectifier(dtype: torch.dtype) -> bool:
    """Return whether PyTorch has oneDNN convolutions with a fused rectifier for `dtype`; its compiler uses the same."""
    return dtype in _fusing_types()


@functools.cache
def _fusing_types() -> frozenset[torch.dtype]:
    """Return the data types for which the operators of oneDNN with a fused rectifier work.

    They are private to PyTorch and may change in any release. Therefore they are tried once; if they are missing or
    fail, rectifiers are applied after the convolutions.
    """
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    types = [torch.float32]
    try:
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            types.append(torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for dtype in types:
                _check_fused_operators(dtype)
    except Exception as error:
        log.warning(
            "the operators of oneDNN with a fused rectifier do not work in PyTorch %s (%s): steps on a CPU are slower. "
            "Install another version of PyTorch if this matters.",
            torch.__version__,
            first_line(error),
        )
        return frozenset()
    return frozenset(types)


def _check_fused_operators(dtype: torch.dtype) -> None:
    """Raise an error unless the fused operators compute what plain PyTorch does for a small example."""
    maps = torch.linspace(-9, 9, 8 * 3 * 3, device="cpu").view(1, 8, 3, 3).to(dtype)
    maps = maps.contiguous(memory_format=torch.channels_last)
    rows, matrix = maps.permute(0, 2, 3, 1), torch.eye(8, device="cpu").to(dtype)
    kernel, bias = torch.ones(8, 1, 3, 3, device="cpu").to(dtype) / 4, torch.ones(8, device="cpu").to(dtype)
    geometry = ((1, 1), (1, 1), (1, 1))
    for limits in ((0.0, None), (0.0, 6.0)):
        fused, plain = _linear_rectified(rows, matrix, bias, limits), F.linear(rows, matrix, bias)
        torch.testing.assert_close(fused, _rectify_(plain, limits), rtol=0.02, atol=0.02)
        fused, plain = _conv_rectified(maps, kernel, bias, limits, geometry), F.conv2d(maps, kernel, bias, 1, 1, 1, 8)
        torch.testing.assert_close(fused, _rectify_(plain, limits), rtol=0.02, atol=0.02)


def _linear_rectified(rows: Tensor, weight: Tensor, bias: Tensor | None, limits: PassRange) -> Tensor:
    """Apply a matrix product and a rectifier with oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, *_onednn_rectifier(limits))


def _conv_rectified(
    x: Tensor, weight: Tensor, bias: Tensor | None, limits: PassRange, geometry: tuple[Pair2d, Pair2d, Pair2d]
) -> Tensor:
    """Apply a depthwise convolution of (padding, stride, dilation) and a rectifier with oneDNN."""
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, len(weight), *_onednn_rectifier(limits))


def _rectify_(y: Tensor, limits: PassRange | None) -> Tensor:
    """Clamp a tensor to `limits` in place; None does nothing."""
    return y if limits is None else y.clamp_(*limits)


def _onednn_rectifier(limits: PassRange) -> tuple[str, list[float], str]:
    """Return the name, the scalars and the algorithm (none) of a rectifier, as the operators of oneDNN take them."""
    low, high = limits
    return ("relu", [], "") if high is None else ("hardtanh", [low, high], "")


def _as_maps(rows: Tensor) -> Tensor:
    """Return (B, H, W, C) as (B, C, H, W) in the same memory, but not as a view for autograd.

    Autograd forbids in-place operations on a view that a custom function returns, such as `y += x` after a convolution.
    """
    maps = rows.permute(0, 3, 1, 2)
    return rows.new_empty(0).set_(rows.untyped_storage(), rows.storage_offset(), maps.shape, maps.stride())


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, limits: PassRange | None) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        if limits is not None and _can_fuse_rectifier(x.dtype):
            y = _linear_rectified(rows, weight, bias, limits)
        else:
            y = _rectify_(F.linear(rows, weight, bias), limits)
        y = _as_maps(y)
        ctx.weight, ctx.limits = weight, limits
        ctx.save_for_backward(None if limits is None else y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = rectifier_gradient(grads[0], ctx.saved_tensors[0], ctx.limits)
        rows = gradient.permute(0, 2, 3, 1)
        input_gradient = rows.reshape(-1, rows.shape[-1]) @ ctx.weight
        return input_gradient.view(*rows.shape[:3], -1).permute(0, 3, 1, 2), None, None, None


class Pointwise(LoweredConv2d):
    """A 1 × 1 convolution, computed as a matrix product over B · H · W rows of C channels."""

    def convolve(self, x: Tensor, limits: PassRange | None) -> Tensor:
        """See `LoweredConv2d`."""
        return _Pointwise.apply(x, self.weight[:, :, 0, 0], self.bias, limits)


@dataclasses.dataclass(frozen=True)
class _DepthwiseKernel:
    """Weights and parameters of a depthwise convolution for one padding.

    Attributes:
        weight: Weights (C, 1, kh, kw), with zeros in front if the padding is uneven.
        flipped: `weight`, flipped along both axes, for the gradient.
        taps: Weights (kh, kw, C) in float32 without the zeros, for `strided_conv_backward`.
        stride: Stride.
        padding: Padding of `weight`.
        taps_padding: Padding of `taps`, at the top and left.
        dilation: Dilation.
    """

    weight: Tensor
    flipped: Tensor
    taps: Tensor
    stride: Pair2d
    padding: Pair2d
    taps_padding: Pair2d
    dilation: Pair2d

    def forward(self, x: Tensor, bias: Tensor | None, limits: PassRange | None = None) -> Tensor:
        """Apply the convolution, and a rectifier with `limits` if they are not None."""
        groups = len(self.weight)
        if limits is not None and _can_fuse_rectifier(x.dtype):
            return _conv_rectified(x, self.weight, bias, limits, (self.padding, self.stride, self.dilation))
        y = F.conv2d(x, self.weight, bias, self.stride, self.padding, self.dilation, groups)
        return _rectify_(y, limits)

    def backward(
        self, gradient: Tensor, size: Pair2d, rectified: Tensor | None = None, limits: PassRange | None = None
    ) -> Tensor:
        """Return the gradient with respect to the input.

        Args:
            gradient: Gradient with respect to the output, (B, C, h, w).
            size: (height, width) of the input.
            rectified: The output, if a rectifier was applied.
            limits: Limits of the rectifier.
        """
        has_loop = (
            len(self.weight) >= strided_conv_backward.LANES and self.weight[0].numel() <= strided_conv_backward.MAX_TAPS
        )
        if self.stride != (1, 1) and has_loop and strided_conv_backward.is_available(gradient):
            geometry = strided_conv_backward.ConvGeometry(size, self.stride, self.taps_padding, self.dilation)
            return strided_conv_backward.depthwise(gradient, self.taps, geometry, rectified, limits)
        gradient = rectifier_gradient(gradient, rectified, limits)
        extent = [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        if self.stride != (1, 1):
            # Positions that the stride skips have no gradient.
            full_size = [n + 2 * p - e for n, p, e in zip(size, self.padding, extent, strict=True)]
            dilated = gradient.new_zeros(len(gradient), *full_size, gradient.shape[1]).permute(0, 3, 1, 2)
            dilated[:, :, :: self.stride[0], :: self.stride[1]] = gradient
            gradient = dilated
        padding = [e - p for e, p in zip(extent, self.padding, strict=True)]
        return F.conv2d(gradient, self.flipped, None, 1, padding, self.dilation, len(self.flipped))


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kernel: _DepthwiseKernel, limits: PassRange | None) -> Tensor:
        y = kernel.forward(x, bias, limits)
        ctx.kernel, ctx.limits, ctx.size = kernel, limits, tuple(x.shape[-2:])
        ctx.save_for_backward(None if limits is None else y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.kernel.backward(grads[0], ctx.size, ctx.saved_tensors[0], ctx.limits), None, None, None


def _subtract(a: Pair2d, b: Pair2d) -> Pair2d:
    return a[0] - b[0], a[1] - b[1]


class PaddedConv2d(LoweredConv2d):
    """A convolution with zero padding, which may be the uneven "same" padding of TensorFlow (timm's Conv2dSame).

    Uneven padding is replaced by even padding and a kernel with zeros in front, so that the input is not copied.
    """

    def __init__(self, conv: nn.Conv2d, limits: PassRange | None) -> None:
        super().__init__(conv, limits)
        self.same = isinstance(conv, Conv2dSame)
        self.stride, self.dilation = (conv.stride[0], conv.stride[1]), (conv.dilation[0], conv.dilation[1])
        self.padding = int(conv.padding[0]), int(conv.padding[1])

    def even_padding(self, size: Sequence[int]) -> tuple[Pair2d, Pair2d]:
        """Return the padding on each side for maps of `size` (height, width), and the zeros in front of the kernel.

        Their difference is the padding at the top and left of the kernel without zeros.
        """
        if not self.same:
            return self.padding, (0, 0)
        # ceil(size / stride) outputs; the positions that they read beyond the map are padding.
        vertical, horizontal = (
            max((-(-n // s) - 1) * s + k - n, 0)
            for n, k, s in zip(size, self.weight.shape[2:], self.stride, strict=True)
        )
        return (-(-vertical // 2), -(-horizontal // 2)), (vertical % 2, horizontal % 2)

    def zero_padded_weight(self, zeros: Pair2d) -> Tensor:
        """Return the weights with zeros in front."""
        return F.pad(self.weight, (zeros[1], 0, zeros[0], 0))


class Depthwise(PaddedConv2d):
    """A depthwise convolution with a faster gradient."""

    def __init__(self, conv: nn.Conv2d, limits: PassRange | None) -> None:
        super().__init__(conv, limits)
        self._kernels: dict[tuple[Pair2d, Pair2d], _DepthwiseKernel] = {}

    def kernel(self, size: Sequence[int]) -> _DepthwiseKernel:
        """Return the kernel for maps of `size` (height, width); kernels are cached, because sizes are few.

        A cached kernel copies the weights. This is safe because presets that change weights are not optimized on a
        lowered network (`requires_original_weights`).
        """
        padding, zeros = self.even_padding(size)
        if (padding, zeros) not in self._kernels:
            weight = self.zero_padded_weight(zeros)
            self._kernels[padding, zeros] = _DepthwiseKernel(
                weight=weight,
                flipped=weight.flip(2, 3),
                taps=self.weight[:, 0].permute(1, 2, 0).float().contiguous(),
                stride=self.stride,
                padding=padding,
                taps_padding=_subtract(padding, zeros),
                dilation=self.dilation,
            )
        return self._kernels[padding, zeros]

    def convolve(self, x: Tensor, limits: PassRange | None) -> Tensor:
        """See `LoweredConv2d`."""
        return _Depthwise.apply(x, self.bias, self.kernel(x.shape[-2:]), limits)


class _FirstConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "FirstConv", limits: PassRange | None) -> Tensor:
        padding, zeros = layer.even_padding(x.shape[-2:])
        y = _rectify_(F.conv2d(x, layer.zero_padded_weight(zeros), layer.bias, layer.stride, padding), limits)
        ctx.layer, ctx.limits, ctx.size = layer, limits, tuple(x.shape[-2:])
        ctx.save_for_backward(None if limits is None else y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        gradient = rectifier_gradient(grads[0], ctx.saved_tensors[0], ctx.limits)
        return ctx.layer.input_gradient(gradient, ctx.size), None, None


class FirstConv(PaddedConv2d):
    """A convolution of few input channels, such as the first of a network, with a faster gradient."""

    def convolve(self, x: Tensor, limits: PassRange | None) -> Tensor:
        """See `LoweredConv2d`."""
        return _FirstConv.apply(x, self, limits)

    def input_gradient(self, gradient: Tensor, size: Pair2d) -> Tensor:
        """Return the gradient with respect to the input.

        Args:
            gradient: Gradient with respect to the output of the convolution, (B, C', h, w).
            size: (height, width) of the input.
        """
        padding, zeros = self.even_padding(size)
        _, channels, kernel_height, kernel_width = self.weight.shape
        if strided_conv_backward.is_available(gradient):
            weight = self.weight.permute(0, 2, 3, 1).flatten(1)
            geometry = strided_conv_backward.ConvGeometry(size, self.stride, _subtract(padding, zeros))
            return strided_conv_backward.dense(gradient, weight, (kernel_height, kernel_width), geometry)
        return torch.ops.aten.convolution_backward(
            gradient,
            gradient.new_empty(len(gradient), channels, *size),  # only its shape is used
            self.zero_padded_weight(zeros),
            None,  # bias
            self.stride,
            padding,
            (1, 1),  # dilation
            False,  # transposed
            (0, 0),  # output padding
            1,  # groups
            (True, False, False),  # gradient of the input only
        )[0]
