"""Run the rest of a network from a layer on, with other values at the layer.

The results of all module calls that are finished before the layer are stored, and take the place of these calls. Of
nested calls only the outermost are stored: in a network of blocks nothing before the block of the layer is computed
again. What a network computes outside of its modules is computed again, from the stored results.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pipeline.core.errors import AtlasError
from pipeline.effects.tensors import map_tensors, with_first_tensor
from pipeline.kernels.device_errors import is_device_failure
from pipeline.layers.finding import Layer
from pipeline.layers.tracing import modules_of
from pipeline.models.loading import Model

log = logging.getLogger(__name__)

# Stored results must give the outputs of a complete pass within this share of their range; else they are not used.
TOLERANCE = 1e-5

# Returns the tensor at a layer with other values.
Edit = Callable[[Tensor], Tensor]

# How results for one image are repeated for its copies: as views of the same memory, which most results are only passed
# on in, or as copies, for networks that change them in place.
VIEWS, COPIES = "views", "copies"


@dataclasses.dataclass
class _Call:
    """A module call of the recorded pass: its module, its place in time, and its result while that is stored."""

    path: str
    start: int
    end: int = -1
    result: Any = None
    stored: bool = False


class RestOfNetwork:
    """The part of a network from a layer to its outputs.

    Args:
        model: The network.
        layer: The layer.
        outputs: The layer of the outputs.

    Attributes:
        repetition: How stored results are repeated: the first of `VIEWS` and `COPIES` with which the outputs are those
            of a complete pass; "" if neither does. Then every pass is a complete one, which gives the same numbers.
    """

    def __init__(self, model: Model, layer: Layer, outputs: Layer) -> None:
        self._model, self._layer, self._outputs = model, layer, outputs
        self._modules = modules_of(model.module)
        self._image: Tensor | None = None
        self._calls: list[_Call] = []
        self.repetition = VIEWS
        self._checked = False

    def record(self, image: Tensor) -> Tensor:
        """Run the network on one image (1, C, H, W) in [0, 1], keep it, and return its outputs (1, K) float32."""
        self._image, self._calls = image, []
        if not self.repetition:
            return self._complete_pass(1, None)
        recorder = _Recorder(self._modules, self._layer)
        with recorder.attached():
            outputs = self._complete_pass(1, None)
        if recorder.tap is None:
            raise AtlasError(f"{self._model.name} did not run {self._layer.name} for a dataset image.")
        self._calls = recorder.calls
        if not self._checked:
            self._checked = True
            self._check(outputs)
        return outputs

    def outputs_with(self, edit: Edit, copies: int) -> Tensor:
        """Return the outputs (copies, K) float32 for copies of the recorded image with other values at the layer.

        Args:
            edit: Receives the tensor at the layer for `copies` copies of the image, and returns it changed.
            copies: Number of copies.
        """
        if not self.repetition:
            return self._complete_pass(copies, edit)
        return self._replay(edit, copies)

    def _replay(self, edit: Edit, copies: int) -> Tensor:
        with _replaced_calls(self._modules, self._calls, functools.partial(REPEAT[self.repetition], copies=copies)):
            return self._complete_pass(copies, edit, self._calls)

    def _check(self, outputs: Tensor) -> None:
        """Choose the repetition of stored results that gives the outputs of the complete pass."""
        reason, scale = "", float(outputs.abs().max()) or 1.0
        for self.repetition in (VIEWS, COPIES):
            try:
                replayed = self._replay(lambda tensor: tensor, 2)
            except Exception as error:  # whatever the code of a network raises for results that it does not expect
                if is_device_failure(error):
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if float((replayed - outputs).abs().max()) <= TOLERANCE * scale:
                return
            reason = "the outputs differ"
        log.info("%s: ablations run the complete network: %s", self._layer.name, reason)
        self.repetition, self._calls = "", []

    def _complete_pass(self, copies: int, edit: Edit | None, stored: "list[_Call] | None" = None) -> Tensor:
        """Run the network with an edit at the layer; calls before it may be replaced by stored results."""
        assert self._image is not None
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        tap = _calls_of_module(stored, self._layer.module, self._layer.call) if stored else self._layer.call
        with contextlib.ExitStack() as stack:
            if edit is not None:
                stack.enter_context(hooked(self._modules[self._layer.module], self._layer.side, {tap: edit}))
            calls = self._outputs.call
            if stored:
                calls = _calls_of_module(stored, self._outputs.module, calls)
            module = self._modules[self._outputs.module]
            stack.enter_context(hooked(module, self._outputs.side, {calls: keep}))
            images = self._image.expand(copies, *self._image.shape[1:])
            images = images.contiguous(memory_format=self._model.memory_format)
            self._model.module(self._model.normalize(images))
        if not kept:
            raise AtlasError(f"{self._model.name} did not run {self._outputs.name} for a dataset image.")
        return output_values(self._outputs, kept[0], copies)


def output_values(layer: Layer, tensor: Tensor, batch: int) -> Tensor:
    """Return the outputs of images, (B, K) float32: the spatial mean of each channel of the layer of outputs."""
    return layer.maps(tensor, batch).float().mean((2, 3))


@contextlib.contextmanager
def hooked(module: nn.Module, side: str, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Pass the first tensor of the input or output of calls of a module through functions.

    Args:
        module: The module.
        side: "in" or "out".
        edits: For the number of a call, from 1, a function that returns the tensor to go on with.
    """
    count = 0

    def at_layer(value: Any) -> Any:
        nonlocal count
        count += 1
        return with_first_tensor(value, edits[count]) if count in edits else value

    handle = (
        module.register_forward_pre_hook(lambda _module, args, kwargs: at_layer((args, kwargs)), with_kwargs=True)
        if side == "in"
        else module.register_forward_hook(lambda _module, _args, output: at_layer(output))
    )
    try:
        yield
    finally:
        handle.remove()


class _Recorder:
    """Hooks on all modules that store the results of the outermost calls that are finished before a layer.

    Attributes:
        calls: All calls that began before the layer, in the order in which they began.
        tap: Time at which the tensor of the layer existed; None before.
    """

    def __init__(self, modules: dict[str, nn.Module], layer: Layer) -> None:
        self._modules, self._layer = modules, layer
        self.calls: list[_Call] = []
        self.tap: int | None = None
        self._time = 0
        self._open: list[_Call] = []
        self._calls_of_layer = 0

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Record the pass inside the block."""
        handles = []
        for path, module in self._modules.items():
            handles.append(module.register_forward_pre_hook(self._before(path)))
            # First of all hooks, so that the result does not contain the changes of others.
            handles.append(module.register_forward_hook(self._after(path), prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _reaches_layer(self, path: str, side: str) -> bool:
        """Count the calls of the layer's module; note the time if this is the one whose tensor is the layer."""
        if (path, side) != (self._layer.module, self._layer.side):
            return False
        self._calls_of_layer += 1
        if self._calls_of_layer == self._layer.call:
            self.tap = self._time
        return self.tap is not None

    def _before(self, path: str) -> Callable[..., None]:
        def before(*_: Any) -> None:
            if self.tap is not None:
                return
            self._time += 1
            if self._reaches_layer(path, "in"):
                return
            call = _Call(path, self._time)
            self.calls.append(call)
            self._open.append(call)

        return before

    def _after(self, path: str) -> Callable[..., None]:
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if self.tap is not None:
                return
            self._time += 1
            if self._reaches_layer(path, "out"):
                return
            call = self._open.pop()
            # The network may change its tensors in place afterwards.
            call.end, call.result, call.stored = self._time, map_tensors(output, Tensor.clone), True
            for inner in reversed(self.calls):
                if inner is call:
                    break
                inner.result, inner.stored = None, False

        return after


def _executed(calls: list[_Call]) -> Iterator[_Call]:
    """Yield the calls that happen when stored results replace calls: all but those inside replaced calls."""
    end = -1
    for call in calls:
        if call.start < end:
            continue
        if call.stored:
            end = call.end
        yield call


def _calls_of_module(calls: list[_Call], path: str, number: int) -> int:
    """Return which call of a module the call `number` of the complete pass is when stored results replace calls."""
    before = sum(call.path == path for call in calls)
    skipped = before - sum(call.path == path for call in _executed(calls))
    return number - skipped


@contextlib.contextmanager
def _replaced_calls(
    modules: dict[str, nn.Module], calls: list[_Call], repeat: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Let modules return stored results, repeated for copies of the image, in place of their calls before the layer."""
    scripts: dict[str, list[_Call]] = {}
    for call in _executed(calls):
        scripts.setdefault(call.path, []).append(call)
    replaced = [modules[path] for path, own in scripts.items() if any(call.stored for call in own)]
    former = [module.__dict__.get("forward") for module in replaced]
    try:
        for path, own in scripts.items():
            if any(call.stored for call in own):
                modules[path].__dict__["forward"] = _scripted(modules[path].forward, iter(own), repeat)
        yield
    finally:
        for module, forward in zip(replaced, former, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def _scripted(
    forward: Callable[..., Any], script: Iterator[_Call], repeat: Callable[[Tensor], Tensor]
) -> Callable[..., Any]:
    def scripted(*args: Any, **kwargs: Any) -> Any:
        call = next(script, None)
        if call is None or not call.stored:
            return forward(*args, **kwargs)
        return map_tensors(call.result, repeat)

    return scripted


def _views(tensor: Tensor, copies: int) -> Tensor:
    """Return a result for one image as that for copies of it, which share its memory where it has one entry."""
    if tensor.dim() and tensor.shape[0] == 1:
        return tensor.expand(copies, *tensor.shape[1:])
    return _copies(tensor, copies)


def _copies(tensor: Tensor, copies: int) -> Tensor:
    """Return a result for one image as that for copies of it; all entries of a copy stay together in the first axis."""
    return tensor.repeat(copies, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor.clone()


REPEAT = {VIEWS: _views, COPIES: _copies}
