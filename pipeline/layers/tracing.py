"""Record every module call of a forward pass: output shapes, multiply-adds, and which call reads which tensor."""

import collections
import dataclasses
import importlib
import itertools
import math
import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.core.errors import AtlasError
from pipeline.kernels.device_errors import is_device_failure
from pipeline.layers.refusals import NotTaken
from pipeline.models.loading import Model

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


def class_of(module: nn.Module) -> type:
    """Return the class of a module; for a module of an exported program, the torch class it was exported from."""
    type_name = getattr(module, "type_name", None)
    package, _, name = str(type_name() if callable(type_name) else "").rpartition(".")
    if package.startswith("torch.nn."):
        return getattr(importlib.import_module(package), name, type(module))
    return type(module)


def kind_of(module: nn.Module) -> str:
    """Return the kind of a module: conv, linear, norm, pool, attention, activation, block, or its class in lower case.

    "block" is any module with children that is none of the others.
    """
    cls = class_of(module)
    name = cls.__name__
    if issubclass(cls, CONVS):
        return "conv"
    if issubclass(cls, nn.Linear):
        return "linear"
    if issubclass(cls, NORMS) or re.search(r"norm", name, re.I):
        return "norm"
    if "pool" in name.lower():
        return "pool"
    if "attention" in name.lower() or name in ("Attn", "AttentionRope"):
        return "attention"
    if any(True for _ in module.children()):
        return "block"
    if "activation" in cls.__module__:
        return "activation"
    return name.lower()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield all tensors of nested tuples, lists, mappings and dataclasses, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def tensor_of(value: Any) -> Tensor | None:
    """Return the first tensor of a module's input or output; None if it has none.

    In nested outputs the first one is the main one: attention returns its output before its weights, GoogLeNet its
    logits before those of its auxiliary heads.
    """
    return next(tensors_in(value), None)


def run_on_noise(model: Model, size: tuple[int, ...] | None = None) -> None:
    """Run the network on one image of noise, always the same, for what hooks and modes observe.

    Args:
        model: The network.
        size: (height, width) of the image; None for the network's own.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, model.preprocessing.channels, *(size or model.preprocessing.size), generator=generator)
    model.module(model.normalize(images.to(model.device)))


def modules_of(module: nn.Module) -> dict[str, nn.Module]:
    """Return all modules that accept hooks, by path: not script modules and the modules inside them."""
    modules: dict[str, nn.Module] = {}
    scripts: list[str] = []
    for path, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            scripts.append(f"{path}.")
        elif not path.startswith(tuple(scripts)):
            modules[path] = child
    return modules


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a module in a traced forward pass.

    Tensors are identified by integers that are unique within the trace.

    Attributes:
        path: Path of the module; "" is the network.
        index: 1 for the first call of the module in the pass, 2 for the second, …
        shape: Shape of the first tensor of its output.
        inputs: Tensors of its input.
        output: The first tensor of its output.
        cost: Multiply-adds of the pass up to the end of this call.
        sample: Some values of the module's output, chosen by `_subsample`; None in a trace of two images.
        batch: The axis that is twice as long for two images as for one; None unless the trace is of two images.
        same: Whether the output for the first of two images equals that of a pass with this image alone.
        finite: Whether the output contains neither infinity nor NaN.
        results: All tensors of its output.
    """

    path: str
    index: int
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    output: int
    cost: float
    sample: Tensor | None = None
    batch: int | None = None
    same: bool = True
    finite: bool = True
    results: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, int]:
        """Module path and call index."""
        return self.path, self.index

    @property
    def name(self) -> str:
        """Name of the layer: the path, with "#2" for the second call, …; "output" for the network's output."""
        return (self.path or "output") + (f"#{self.index}" if self.index > 1 else "")


class Trace:
    """All module calls of one forward pass on noise, in the order in which they returned.

    Args:
        model: The network.
        size: (height, width) of the image in pixels; None for the network's own input size.
        single: A trace of the same size. If it is given, two images are run, of which the first is the image of
            `single`, and the calls of both passes are compared (`Call.batch`, `Call.same`).
        grey: Whether to use an image of uniform grey in place of noise.

    Attributes:
        modules: Modules by path, as weak references: a trace that is kept does not keep the network in memory.
        size: (height, width) of the image in pixels.
        calls: The calls.
        readers: The calls that read a tensor, by tensor.

    Raises:
        NotTaken: If the forward pass raises an error.
    """

    def __init__(
        self, model: Model, size: tuple[int, int] | None = None, single: "Trace | None" = None, grey: bool = False
    ) -> None:
        modules = modules_of(model.module)
        self.modules: Mapping[str, nn.Module] = weakref.WeakValueDictionary(modules)
        self.size = size or model.preprocessing.size
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, model.preprocessing.channels, *self.size, generator=generator)[: 2 if single else 1]
        if grey:
            images = torch.full_like(images, 0.5)
        images = images.to(model.device)
        recorder = _CallRecorder(single)
        handles = [recorder.attach(path, module) for path, module in modules.items()]
        try:
            with torch.no_grad():
                model.module(model.normalize(images))
        except AtlasError:
            raise
        except Exception as error:
            if is_device_failure(error):
                raise
            raise NotTaken(model, images, error) from error
        finally:
            for handle in handles:
                handle.remove()
        self.calls = recorder.calls
        self.readers: dict[int, list[Call]] = {}
        for call in self.calls:
            for tensor in set(call.inputs):
                self.readers.setdefault(tensor, []).append(call)


class _CallRecorder:
    """Forward hooks that append a `Call` to `calls` for every module call that returns a floating-point tensor.

    Args:
        single: The trace that the calls are compared with; see `Trace`.
    """

    def __init__(self, single: Trace | None) -> None:
        self.calls: list[Call] = []
        self._single_calls = None if single is None else {call.key: call for call in single.calls}
        # `id` is reused after a tensor is freed, and keeping all tensors of a pass alive would take gigabytes.
        self._numbers = WeakTensorKeyDictionary()
        self._next_number = itertools.count()
        self._num_calls: collections.Counter[str] = collections.Counter()
        self._cost = 0.0

    def attach(self, path: str, module: nn.Module) -> RemovableHandle:
        """Register the hook of one module."""

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._record(path, module, list(tensors_in((args, kwargs))), list(tensors_in(output)))

        return module.register_forward_hook(hook, with_kwargs=True)

    def _record(self, path: str, module: nn.Module, inputs: list[Tensor], results: list[Tensor]) -> None:
        self._num_calls[path] += 1
        tensor = results[0] if results else None
        if tensor is None or not tensor.is_floating_point() or tensor.dim() < 2:
            return
        weight = getattr(module, "weight", None) if kind_of(module) in ("conv", "linear") else None
        if isinstance(weight, Tensor):
            self._cost += tensor.numel() * weight.numel() / weight.shape[0]
        input_numbers = tuple(map(self._number, inputs))
        result_numbers = tuple(map(self._number, results))
        call = Call(
            path=path,
            index=self._num_calls[path],
            shape=tuple(tensor.shape),
            inputs=input_numbers,
            output=result_numbers[0],
            cost=self._cost,
            results=result_numbers,
        )
        if self._single_calls is None:
            call = dataclasses.replace(call, sample=_subsample(tensor), finite=_is_finite(tensor))
        elif call.key in self._single_calls:
            batch, same = _compare(tensor, self._single_calls[call.key])
            call = dataclasses.replace(call, batch=batch, same=same)
        self.calls.append(call)

    def _number(self, tensor: Tensor) -> int:
        """Return the integer that identifies a tensor."""
        if tensor not in self._numbers:
            self._numbers[tensor] = next(self._next_number)
        return self._numbers[tensor]


def _compare(tensor: Tensor, single: Call) -> tuple[int | None, bool]:
    """Return the batch axis of an output for two images, and whether the first one's part equals that of `single`."""
    batch = _batch_axis(single.shape, tuple(tensor.shape))
    if batch is None or single.sample is None:
        return batch, True
    first = tensor.narrow(batch, 0, single.shape[batch])
    # Kernels are chosen by batch size and round differently; dropout or a batch mean changes values far more.
    scale = float(single.sample.abs().max()) + 1e-6
    return batch, bool((_subsample(first) - single.sample).abs().max() <= 1e-2 * scale)


_traces: "weakref.WeakKeyDictionary[nn.Module, Trace]" = weakref.WeakKeyDictionary()


def trace_of(model: Model) -> Trace:
    """Return the trace of a network at its own input size; it is computed once and cached."""
    trace = _traces.get(model.module)
    if trace is None or trace.size != model.preprocessing.size:
        trace = _traces[model.module] = Trace(model)
    return trace


def _subsample(tensor: Tensor) -> Tensor:
    """Return a copy of some thousand evenly spaced values: later modules may change the tensor in place."""
    per_axis = {2: 64, 3: 16}.get(tensor.dim(), 8)
    return tensor.detach()[tuple(slice(None, None, -(-n // per_axis) or 1) for n in tensor.shape)].float().clone()


def _is_finite(tensor: Tensor) -> bool:
    """Return whether no value is infinity or NaN. A finite sum is enough, but the sum of finite values may overflow."""
    return math.isfinite(float(tensor.sum())) or bool(tensor.isfinite().all())


def _batch_axis(shape: tuple[int, ...], double: tuple[int, ...]) -> int | None:
    """Return the axis that is twice as long in `double` (two images) as in `shape` (one); None if others differ too."""
    if len(shape) != len(double):
        return None
    changed = [axis for axis, (one, two) in enumerate(zip(shape, double, strict=True)) if one != two]
    if len(changed) != 1:
        return None
    axis = changed[0]
    return axis if double[axis] == 2 * shape[axis] else None
