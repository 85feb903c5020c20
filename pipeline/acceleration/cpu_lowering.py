"""A folded network lowered onto what a CPU does fastest: the same function to rounding, for the steps of a picture.

An image-step waits for memory and for kernels that nobody tuned, so four things are exchanged:

* A convolution of 1 x 1 pixels is a matrix product over the rows of a channels-last map.
* The gradient of a depthwise convolution is a depthwise convolution itself, of the gradient spread out over the
  stride, with the kernel turned round. PyTorch's own is a reference loop in bfloat16 and slow in float32. Where there
  is a stride, and for the first convolution, which reads few colours, `striding` has loops of its own.
* The rectifier that a folded normalisation holds is part of the convolution: oneDNN applies it to each number before
  writing it, where PyTorch has oneDNN; elsewhere it works in place on what the convolution wrote.

In bfloat16 there is half as much to read and write, and processors that multiply it themselves do that twice (vectors:
AVX512_BF16) to eight times (tiles: AMX) as fast.
What a finished picture is measured on stays in float32.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from pipeline.acceleration.batchnorm_folding import FoldedNorm, Pair, copy_network, only_argument, plain_forward
from pipeline.acceleration.redirected_relu import Limits, Rectifying, limits_of, passed, redirect
from pipeline.kernels import strided_conv_backward
from pipeline.models.loading import Model


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16: in vectors (AVX512_BF16) or tiles (AMX)."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in told or "amx_bf16" in told


def precision_of(asked: str, device: str) -> torch.dtype:
    """What steps are computed in: `auto` takes bfloat16 on a CPU that multiplies it, float32 elsewhere."""
    if asked == "auto":
        return torch.bfloat16 if device == "cpu" and multiplies_bfloat16() else torch.float32
    return torch.float32 if asked == "float32" else torch.bfloat16


def lower(folded: Model, pairs: Sequence[Pair], dtype: torch.dtype = torch.float32, mixed: bool = False) -> Model:
    """Return a copy of a `folded` network in `dtype`, on a CPU with its convolutions replaced.

    Args:
        folded: The network; it is not changed.
        pairs: What `foldable` returned. Pairs that were not folded, because a layer is read inside, stay as they are.
        dtype: Data type of weights and activations. Tensors are shared where it is the type that they have.
        mixed: Whether to run under autocast, for networks that create float32 tensors in their forward pass or use
            operators that need them: operators then receive the type that they support.
    """
    on_cpu = next(folded.module.parameters()).device.type == "cpu"
    if not on_cpu and dtype == torch.float32:
        return folded
    model = in_precision(folded, dtype)
    # The replacements compute channels-last.
    if on_cpu and folded.channels_last:
        _replace_convolutions(model.module, dict(pairs))
    if mixed:
        _run_mixed(model.module, dtype)
    return model


def in_precision(model: Model, dtype: torch.dtype) -> Model:
    """Return a copy of a network whose weights, buffers and input are in `dtype`; tensors of that type are shared."""
    module = copy_network(model.module, lambda tensor: _converted(tensor, dtype))
    if dtype != torch.float32:

        def in_dtype(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            def cast(x: Any) -> Any:
                return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

            return tuple(map(cast, args)), {key: cast(x) for key, x in kwargs.items()}

        module.register_forward_pre_hook(in_dtype, with_kwargs=True)
    return dataclasses.replace(model, module=module)


def _run_mixed(module: nn.Module, dtype: torch.dtype) -> None:
    """Make a module run its forward pass under autocast."""
    forward, device = module.forward, next(module.parameters()).device.type

    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype):
            return forward(*args, **kwargs)

    module.forward = autocast  # type: ignore[method-assign]


def _replace_convolutions(module: nn.Module, norms: dict[str, str]) -> None:
    """Replace the convolutions of `module` in place; `norms` are the folded normalizations by their convolution."""
    for path, conv in list(module.named_modules()):
        kind = _kind(conv)
        if kind is None or not path:
            continue
        norm = module.get_submodule(norms[path]) if path in norms else None
        limits = None
        if isinstance(norm, FoldedNorm) and isinstance(norm.drop, nn.Identity):
            limits = limits_of(norm.act)
            if limits is not None:
                norm.act = nn.Identity()
        parent, _, name = path.rpartition(".")
        assert isinstance(conv, nn.Conv2d)
        setattr(module.get_submodule(parent), name, kind(conv, limits).eval())


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a parameter, a buffer or a tensor kept as an attribute in `dtype`; the same tensor for float32."""
    if dtype == torch.float32 or not tensor.is_floating_point():
        return tensor
    converted = tensor.detach().to(dtype)
    return nn.Parameter(converted, requires_grad=False) if isinstance(tensor, nn.Parameter) else converted


def _kind(module: nn.Module) -> "type[LoweredConv2d] | None":
    """What a module is exchanged for; None where nothing is known that is faster."""
    # A subclass may do anything with its weights; timm's Conv2dSame only pads.
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
    reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    inside = all(p <= r for p, r in zip(module.padding, reach, strict=True))
    if module.groups == module.in_channels == module.out_channels > 1 and inside:
        return Depthwise
    if module.groups == 1 and module.in_channels <= THIN and module.dilation == (1, 1) and inside:
        return FirstConv
    return None


# Along the map: down, across.
Places = tuple[int, int]

# A convolution of more channels than this is dense: its gradient has kernels that are tuned.
THIN = 4


class LoweredConv2d(Rectifying):
    """A convolution, and the rectifier behind it if `limits` says one."""

    def __init__(self, conv: nn.Conv2d, limits: Limits | None) -> None:
        super().__init__(limits)
        self.weight, self.bias = conv.weight, conv.bias

    def convolved(self, x: Tensor, limits: Limits | None) -> Tensor:
        """The convolution, and a rectifier of `limits`."""
        raise NotImplementedError

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H', W'); the input may be given by whatever keyword the replaced module has for it."""
        # Under autocast the input may be of another type than the weights.
        x = only_argument(args, kwargs).to(self.weight.dtype)
        if self.redirecting and self.limits is not None:
            return redirect(self.convolved(x, None), self.limits)
        return self.convolved(x, self.limits)


@functools.cache
def _fusing(dtype: torch.dtype) -> bool:
    """Whether this PyTorch has convolutions that end in a rectifier for numbers of a kind: what its compiler uses."""
    ops = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available():
        return False
    if not (hasattr(ops, "_linear_pointwise") and hasattr(ops, "_convolution_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported()))


def _rectified(y: Tensor, limits: Limits | None) -> Tensor:
    """In place: between the limits."""
    return y if limits is None else y.clamp_(*limits)


def _ending(limits: Limits) -> tuple[str, list[float], str]:
    """oneDNN's name of a rectifier, its numbers, and the algorithm, of which there is but one."""
    low, high = limits
    return ("relu", [], "") if high is None else ("hardtanh", [low, high], "")


def _as_maps(rows: Tensor) -> Tensor:
    """Return (B, H, W, C) as (B, C, H, W) on the same memory, without being a view of it for autograd.

    Autograd forbids writing in place into a view that a custom function returns, as `y += x` after a convolution.
    """
    maps = rows.permute(0, 3, 1, 2)
    return rows.new_empty(0).set_(rows.untyped_storage(), rows.storage_offset(), maps.shape, maps.stride())


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, limits: Limits | None) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        if limits is not None and _fusing(x.dtype):
            y = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, *_ending(limits))
        else:
            y = _rectified(F.linear(rows, weight, bias), limits)
        y = _as_maps(y)
        ctx.weight, ctx.limits = weight, limits
        ctx.save_for_backward(None if limits is None else y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = grads
        rows = passed(gradient, ctx.saved_tensors[0], ctx.limits).permute(0, 2, 3, 1)
        back = rows.reshape(-1, rows.shape[-1]) @ ctx.weight
        return back.view(*rows.shape[:3], -1).permute(0, 3, 1, 2), None, None, None


class Pointwise(LoweredConv2d):
    """A convolution of 1 × 1 pixels."""

    def convolved(self, x: Tensor, limits: Limits | None) -> Tensor:
        """As a matrix product over (B, H, W) rows of C."""
        return _Pointwise.apply(x, self.weight[:, :, 0, 0], self.bias, limits)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A depthwise convolution's weights, the same turned round for its gradient, and its numbers, (down, across).

    `taps` are the weights (kh, kw, C) as `striding` takes them, without zeros, and `front` their padding.
    """

    weight: Tensor
    turned: Tensor
    taps: Tensor
    stride: Places
    padding: Places
    front: Places
    dilation: Places

    def apply(self, x: Tensor, bias: Tensor | None, limits: Limits | None = None) -> Tensor:
        """The convolution, and the rectifier that `limits` says."""
        groups = len(self.weight)
        if limits is not None and _fusing(x.dtype):
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, bias, self.padding, self.stride, self.dilation, groups, *_ending(limits)
            )
        return _rectified(F.conv2d(x, self.weight, bias, self.stride, self.padding, self.dilation, groups), limits)

    def back(
        self, gradient: Tensor, size: Places, rectified: Tensor | None = None, limits: Limits | None = None
    ) -> Tensor:
        """The gradient of what it gave → that of the maps of `size` = (height, width) it was given.

        A rectifier of `limits` behind it gave `rectified`.
        """
        fits = len(self.weight) >= strided_conv_backward.LANES and self.weight[0].numel() <= strided_conv_backward.TAPS
        if self.stride != (1, 1) and fits and strided_conv_backward.available(gradient):
            numbers = (self.taps, size, self.stride, self.front, self.dilation)
            return strided_conv_backward.depthwise(gradient, rectified, limits, *numbers)
        gradient = passed(gradient, rectified, limits)
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]
        if self.stride != (1, 1):
            # What a stride left out had no part in any output.
            room = [n + 2 * p - r for n, p, r in zip(size, self.padding, reach, strict=True)]
            spread = gradient.new_zeros(len(gradient), *room, gradient.shape[1]).permute(0, 3, 1, 2)
            spread[:, :, :: self.stride[0], :: self.stride[1]] = gradient
            gradient = spread
        padding = [r - p for r, p in zip(reach, self.padding, strict=True)]
        return F.conv2d(gradient, self.turned, None, 1, padding, self.dilation, len(self.turned))


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kernel: _Kernel, limits: Limits | None) -> Tensor:
        y = kernel.apply(x, bias, limits)
        ctx.kernel, ctx.limits, ctx.size = kernel, limits, tuple(x.shape[-2:])
        ctx.save_for_backward(None if limits is None else y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.kernel.back(grads[0], ctx.size, ctx.saved_tensors[0], ctx.limits), None, None, None


def _less(places: Places, by: Places) -> Places:
    return places[0] - by[0], places[1] - by[1]


class Padded(LoweredConv2d):
    """A convolution with padding, which may be "same" and uneven, as TensorFlow's is where a stride halves the map.

    That becomes an even one of a kernel with zeros in front: nothing is copied.
    """

    def __init__(self, conv: nn.Conv2d, limits: Limits | None) -> None:
        super().__init__(conv, limits)
        self.same = isinstance(conv, Conv2dSame)
        self.stride, self.dilation = (conv.stride[0], conv.stride[1]), (conv.dilation[0], conv.dilation[1])
        self.padding = int(conv.padding[0]), int(conv.padding[1])

    def padded(self, size: Sequence[int]) -> tuple[Places, Places]:
        """For maps of `size` = (height, width): padding on all sides, and zeros in front of the kernel.

        Without these the kernel itself has so much less padding in front.
        """
        if not self.same:
            return self.padding, (0, 0)
        # As many places as strides begin in the map: what is then read beyond it is padding.
        sides = zip(size, self.weight.shape[2:], self.stride, strict=True)
        down, across = (max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in sides)
        return (-(-down // 2), -(-across // 2)), (down % 2, across % 2)

    def zeroed(self, more: Places) -> Tensor:
        """The weights with zeros in front."""
        return F.pad(self.weight, (more[1], 0, more[0], 0))


class Depthwise(Padded):
    """A convolution of each channel by itself."""

    def __init__(self, conv: nn.Conv2d, limits: Limits | None) -> None:
        super().__init__(conv, limits)
        self._kernels: dict[tuple[Places, Places], _Kernel] = {}

    def kernel(self, size: Sequence[int]) -> _Kernel:
        """What convolves maps of `size` = (height, width); kept, for there are few sizes and many steps."""
        padding, more = self.padded(size)
        if (padding, more) not in self._kernels:
            weight, taps = self.zeroed(more), self.weight[:, 0].permute(1, 2, 0).float().contiguous()
            numbers = (self.stride, padding, _less(padding, more), self.dilation)
            self._kernels[padding, more] = _Kernel(weight, weight.flip(2, 3), taps, *numbers)
        return self._kernels[padding, more]

    def convolved(self, x: Tensor, limits: Limits | None) -> Tensor:
        """With its own gradient."""
        return _Depthwise.apply(x, self.bias, self.kernel(x.shape[-2:]), limits)


class _Thin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "FirstConv", limits: Limits | None) -> Tensor:
        padding, more = layer.padded(x.shape[-2:])
        y = _rectified(F.conv2d(x, layer.zeroed(more), layer.bias, layer.stride, padding), limits)
        ctx.layer, ctx.limits, ctx.size = layer, limits, tuple(x.shape[-2:])
        ctx.save_for_backward(None if limits is None else y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        layer: FirstConv = ctx.layer
        gradient = passed(grads[0], ctx.saved_tensors[0], ctx.limits)
        padding, more = layer.padded(ctx.size)
        if strided_conv_backward.available(gradient):
            weight = layer.weight.permute(0, 2, 3, 1).flatten(1)
            kernel = (layer.weight.shape[2], layer.weight.shape[3])
            return (
                strided_conv_backward.dense(gradient, weight, kernel, ctx.size, layer.stride, _less(padding, more)),
                None,
                None,
            )
        back = torch.ops.aten.convolution_backward
        like, numbers = gradient.new_empty(len(gradient), layer.weight.shape[1], *ctx.size), (padding, (1, 1))
        weight, wanted = layer.zeroed(more), (True, False, False)
        return back(gradient, like, weight, None, layer.stride, *numbers, False, (0, 0), 1, wanted)[0], None, None


class FirstConv(Padded):
    """A convolution that reads few channels: a network's first, of colours."""

    def convolved(self, x: Tensor, limits: Limits | None) -> Tensor:
        """With its own gradient."""
        return _Thin.apply(x, self, limits)
