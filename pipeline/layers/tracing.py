"""What a network's modules do in one forward pass: every call, what came out, and which tensor went where."""

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
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.core.errors import AtlasError
from pipeline.layers.refusals import NotTaken
from pipeline.models.loading import Model

CONVS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


def class_of(module: nn.Module) -> type:
    """A module's class; of an exported program's module the class that it was exported from, where it is torch's."""
    named = getattr(module, "type_name", None)
    place, _, name = str(named() if callable(named) else "").rpartition(".")
    if place.startswith("torch.nn."):
        return getattr(importlib.import_module(place), name, type(module))
    return type(module)


def kind_of(module: nn.Module) -> str:
    """A word for what a module is: conv, linear, norm, pool, attention, activation, block, …"""
    kind = class_of(module)
    name = kind.__name__
    if issubclass(kind, CONVS):
        return "conv"
    if issubclass(kind, nn.Linear):
        return "linear"
    if issubclass(kind, NORMS) or re.search(r"norm", name, re.I):
        return "norm"
    if "pool" in name.lower():
        return "pool"
    if "attention" in name.lower() or name in ("Attn", "AttentionRope"):
        return "attention"
    if any(True for _ in module.children()):
        return "block"
    if kind.__module__.endswith("activation") or "activation" in kind.__module__:
        return "activation"
    return name.lower()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of nested tuples, lists, mappings and dataclasses, in their order."""
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
    """The tensor of a module's output or input: itself, or the first part of a tuple, mapping or dataclass.

    Attention gives its output and then its weights, GoogLeNet its logits and then those of its auxiliary heads.
    """
    return next(tensors_in(value), None)


def modules_of(module: nn.Module) -> dict[str, nn.Module]:
    """All modules that hooks can observe, by path: script modules and what lies inside them take none.

    The modules around and behind a script module are layers as usual.
    """
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
    """The `index`-th call of the module at `path`: shape and identity of its output, identities of its inputs.

    `results` are the identities of all tensors of the output, of which `output` is the first. `cost` is the number of
    multiply-adds up to here. `batch` is the axis that grew with the batch, where the pass was compared with another of
    half its batch; `same` whether the shared half came out the same. `finite` is False for infinity or NaN.
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
        """What a layer tapped here is called: the module's path, `#2` for its second call; the network's: output."""
        return (self.path or "output") + (f"#{self.index}" if self.index > 1 else "")


class Trace:
    """All module calls of one forward pass on noise, in the order in which they ended.

    The images are `size` pixels (height, width), by default those of the recipe. With `half`, a trace of
    another pass of the same size, two images are run, of which the first is the one that `half` saw. With `grey`, the
    image is one colour in the place of noise.
    """

    def __init__(
        self, model: Model, size: tuple[int, int] | None = None, half: "Trace | None" = None, grey: bool = False
    ) -> None:
        # Weak, so that a trace that is kept does not keep the network.
        self.modules: Mapping[str, nn.Module] = weakref.WeakValueDictionary(modules_of(model.module))
        self.size = size or model.recipe.size
        self.calls: list[Call] = []
        known = {call.key: call for call in half.calls} if half else {}
        # Numbers of their own, for Python's identities are used again, and keeping all tensors would take gigabytes.
        numbers = WeakTensorKeyDictionary()
        counter = itertools.count()

        def number(tensor: Tensor) -> int:
            if tensor not in numbers:
                numbers[tensor] = next(counter)
            return numbers[tensor]

        counts: dict[str, int] = {}
        spent = 0.0

        def after(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal spent
            counts[path] = index = counts.get(path, 0) + 1
            results = list(tensors_in(output))
            tensor = results[0] if results else None
            if tensor is None or not tensor.is_floating_point() or tensor.dim() < 2:
                return
            if kind_of(module) in ("conv", "linear") and isinstance(weight := getattr(module, "weight", None), Tensor):
                spent += tensor.numel() * weight.numel() / weight.shape[0]
            inputs = list(tensors_in((args, kwargs)))
            shape = tuple(tensor.shape)
            batch, same, sample, finite = None, True, None, True
            if half is None:
                sample, finite = _sampled(tensor), _finite(tensor)
            elif (before := known.get((path, index))) is not None:
                batch = _batch_axis(before.shape, shape)
                if batch is not None and before.sample is not None:
                    first = tensor.narrow(batch, 0, before.shape[batch])
                    # Kernels are chosen by size and round differently; a dropout or a batch mean differs grossly.
                    scale = float(before.sample.abs().max()) + 1e-6
                    same = bool((_sampled(first) - before.sample).abs().max() <= 1e-2 * scale)
            read, given = tuple(map(number, inputs)), tuple(map(number, results))
            self.calls.append(Call(path, index, shape, read, given[0], spent, sample, batch, same, finite, given))

        handles = [
            module.register_forward_hook(
                lambda m, a, k, o, path=path: after(path, m, a, k, o), with_kwargs=True
            )
            for path, module in modules_of(model.module).items()
        ]  # fmt: skip
        device = next(model.module.parameters()).device
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(2, model.recipe.channels, *self.size, generator=generator)[: 2 if half else 1]
        if grey:
            images = torch.full_like(images, 0.5)
        try:
            with torch.no_grad():
                model.module(model.normalise(images.to(device)))
        except AtlasError:
            raise
        except Exception as error:
            raise NotTaken(model, images, error) from error
        finally:
            for handle in handles:
                handle.remove()
        self.readers: dict[int, list[Call]] = {}
        for call in self.calls:
            for identity in set(call.inputs):
                self.readers.setdefault(identity, []).append(call)


_traces: "weakref.WeakKeyDictionary[nn.Module, Trace]" = weakref.WeakKeyDictionary()


def trace_of(model: Model) -> Trace:
    """Return the trace of a network at its own input size, made once for each network."""
    trace = _traces.get(model.module)
    if trace is None or trace.size != model.recipe.size:
        trace = _traces[model.module] = Trace(model)
    return trace


def _sampled(tensor: Tensor) -> Tensor:
    """Some thousand values, evenly over the tensor, as they are now: what follows may work in place."""
    steps = {2: 64, 3: 16}.get(tensor.dim(), 8)
    return tensor.detach()[tuple(slice(None, None, -(-n // steps) or 1) for n in tensor.shape)].float().clone()


def _finite(tensor: Tensor) -> bool:
    """Whether no value is infinity or NaN; a sum tells it at once unless it overflows."""
    return math.isfinite(float(tensor.sum())) or bool(tensor.isfinite().all())


def _batch_axis(one: tuple[int, ...], two: tuple[int, ...]) -> int | None:
    """The axis that is twice as long for two images as for one; None where there is not exactly one."""
    if len(one) != len(two):
        return None
    grown = [i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    return grown[0] if len(grown) == 1 and two[grown[0]] == 2 * one[grown[0]] else None
