"""Find the layers whose values have a zero that means something: a rectifier reads them, or made them.

The share of positive activations, the sparsity of rectified activations and the like describe a unit only if zero is a
threshold of its values. It is one before a rectifier, which passes positive values and suppresses negative ones, and
behind it. It is none in the linear output of a residual block, in logits, or before a sigmoid: there zero is as
arbitrary as any other value.

Smooth rectifiers count, because they too change their behavior at zero: SiLU, GELU, Mish and Hardswish multiply x by a
gate that is ½ at x = 0 and closes below, so that nothing under −0.38 comes out; ELU, SELU, CELU, leaky and parametric
ReLU have their kink at 0. Sigmoid and softmax make values that are never negative: these count behind, not before.

The operations of one forward pass are observed below the modules (`TorchDispatchMode`), so that rectifiers that are
called as functions are found as well as modules.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.core.errors import first_line
from pipeline.kernels.device_errors import is_device_failure
from pipeline.layers.tracing import modules_of, run_on_noise, tensor_of, tensors_in
from pipeline.models.loading import Model

log = logging.getLogger(__name__)

# Where a layer is read: module path, number of the call from 1, "in" or "out" for the input or the output.
Tap = tuple[str, int, str]

# Operations by their names in ATen, without the underscore of the variants that change their input in place.
RECTIFIERS = frozenset(
    ("relu", "leaky_relu", "prelu", "_prelu_kernel", "elu", "celu", "silu", "gelu", "mish", "hardswish", "softplus")
)
# Rectifiers if their lower bound, the second argument, is 0. ReLU6 is a hardtanh.
BOUNDED = frozenset(("hardtanh", "clamp", "clamp_min", "threshold"))
# Operations whose values are never negative.
GATES = frozenset(("sigmoid", "hardsigmoid", "_softmax", "exp", "square", "abs"))
# Operations that return the same values in another shape, order in memory or type. Operations such as `reshape` and
# `flatten` are made of these.
SAME_VALUES = frozenset(
    ("view", "_unsafe_view", "_reshape_alias", "permute", "transpose", "t", "unsqueeze", "squeeze", "clone", "_to_copy")
)
# Operations that make no negative value of values that are not negative.
SIGN_KEEPING = SAME_VALUES.union(
    ("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "sum", "amax"),
    ("cat", "stack", "add", "mul", "slice", "select", "split", "split_with_sizes", "unbind", "as_strided", "roll"),
    ("constant_pad_nd", "upsample_nearest2d", "upsample_bilinear2d"),
)


def rectified_taps(model: Model, taps: Collection[Tap]) -> set[Tap]:
    """Return those taps whose tensor is read by a rectifier, unchanged, or was made by one.

    Pooling, concatenation, sums and products of tensors that are never negative count as made by a rectifier. A tap
    that a forward pass on noise does not reach is left out.

    Args:
        model: The network.
        taps: Where layers are read.
    """
    modules = modules_of(model.module)
    observer = _Observer()
    places = {(path, side) for path, _, side in taps}
    handles = [observer.attach(path, side, modules[path], taps) for path, side in places]
    try:
        with torch.no_grad(), observer:
            run_on_noise(model)
    except Exception as error:
        if is_device_failure(error):
            raise
        # The network itself runs. Operations that cannot be observed (control flow of exported programs, extensions of
        # others) must not stop a run: its layers get the statistics that need no zero.
        log.warning("%s: rectifiers cannot be found, so zero counts as arbitrary: %s", model.name, first_line(error))
        return set()
    finally:
        for handle in handles:
            handle.remove()
    return observer.rectified


class _Marks:
    """Values by tensor; a value is lost when the tensor is changed in place."""

    def __init__(self) -> None:
        # Weak, because `id` is reused after a tensor is freed, and all tensors of a pass take too much memory.
        self._values = WeakTensorKeyDictionary()

    def set(self, tensor: Tensor, value: frozenset[Tap], changes: int = 0) -> None:
        """Store a value, which holds until the tensor is changed more than `changes` times."""
        if not tensor.is_inference():  # tensors of inference mode have no version
            self._values[tensor] = (tensor._version + changes, value)

    def get(self, tensor: Tensor) -> frozenset[Tap] | None:
        stored: tuple[int, frozenset[Tap]] | None = self._values.get(tensor)
        return stored[1] if stored is not None and stored[0] == tensor._version else None


class _Observer(TorchDispatchMode):
    """Follows tensors of layers and of rectifiers through the operations of a forward pass.

    Attributes:
        rectified: The taps that were found to be rectified.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rectified: set[Tap] = set()
        self._taps_of = _Marks()
        self._never_negative = _Marks()

    def attach(self, path: str, side: str, module: nn.Module, taps: Collection[Tap]) -> RemovableHandle:
        """Register the hook for the taps of one module and side."""
        calls = 0

        def reach(value: Any) -> None:
            nonlocal calls
            calls += 1
            tensor, tap = tensor_of(value), (path, calls, side)
            if tensor is None or tap not in taps:
                return
            self._taps_of.set(tensor, (self._taps_of.get(tensor) or frozenset()) | {tap})
            if self._never_negative.get(tensor) is not None:
                self.rectified.add(tap)

        if side == "in":
            return module.register_forward_pre_hook(lambda _, args, kwargs: reach((args, kwargs)), with_kwargs=True)
        return module.register_forward_hook(lambda _, _args, output: reach(output))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation, and pass on what is known of its inputs."""
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__.removesuffix("_")
        inputs = list(tensors_in((args, kwargs)))
        # The marks of the inputs are read before the operation, which may change them in place.
        taps = self._taps_of.get(inputs[0]) if inputs else None
        is_rectifier = name in RECTIFIERS or (name in BOUNDED and _lower_bound(args, kwargs) == 0)
        if is_rectifier and taps:
            self.rectified |= taps
        keeps_sign = name in SIGN_KEEPING and not (name in ("add", "mul") and _has_negative_number(args, kwargs))
        never_negative = is_rectifier or name in GATES or (keeps_sign and self._all_never_negative(inputs))
        result = func(*args, **kwargs)
        # PyTorch counts a change in place after this method has returned.
        changes = int(func.overloadpacket.__name__.endswith("_"))
        for tensor in tensors_in(result):
            if never_negative:
                self._never_negative.set(tensor, frozenset(), changes)
            if name in SAME_VALUES and taps:
                self._taps_of.set(tensor, taps, changes)
        return result

    def _all_never_negative(self, inputs: Sequence[Tensor]) -> bool:
        return bool(inputs) and all(self._never_negative.get(tensor) is not None for tensor in inputs)


def _has_negative_number(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a sum or product has a constant below 0."""
    return any(isinstance(value, (int, float)) and value < 0 for value in (*args, *kwargs.values()))


def _lower_bound(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the second argument of an operation, under which its output does not fall; None if it has none."""
    if len(args) > 1:
        return args[1]
    return next((kwargs[name] for name in ("min_val", "min", "threshold") if name in kwargs), None)
