"""Run the rest of a network from a layer on, with other values at the layer.

One complete pass over an image is recorded for all layers: the results of module calls, and the times at which calls
were finished and layers were reached. For a layer, the results that are finished before it take the place of their
calls; of nested calls only the outermost. In a network of blocks nothing before the block of the layer is computed
again. What a network computes outside of its modules is computed again, from the stored results.
"""

import contextlib
import dataclasses
import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """A module call of the recorded pass.

    Attributes:
        path: Path of the module.
        start: Time at which it began.
        end: Time at which it was finished; infinite before.
        result: Its result, until no layer needs it.
        stored: Whether the result takes the place of the call: it was finished before the layer in question.
    """

    path: str
    start: int
    end: float = math.inf
    result: Any = None
    stored: bool = False


class RestOfNetwork:
    """The parts of a network from each of some layers to its outputs.

    Args:
        model: The network.
        layers: The layers; all other arguments name a layer by its number among them.
        outputs: The layer of the outputs.

    Attributes:
        repetitions: How stored results are repeated for each layer: the first of `VIEWS` and `COPIES` with which the
            outputs are those of a complete pass; "" if neither does. Then every pass from this layer on is a complete
            one, which gives the same numbers.
    """

    def __init__(self, model: Model, layers: Sequence[Layer], outputs: Layer) -> None:
        self._model, self._layers, self._outputs = model, tuple(layers), outputs
        self._modules = modules_of(model.module)
        self._image: Tensor | None = None
        self._calls: dict[int, list[_Call]] = {}
        self.repetitions = [VIEWS] * len(self._layers)
        self._checked = False

    def record(self, image: Tensor) -> Tensor:
        """Run the network on one image (1, C, H, W) in [0, 1], keep it, and return its outputs (1, K) float32.

        Raises:
            AtlasError: If the network does not run one of the layers.
        """
        self._image = image
        outputs = self._recorded_pass()
        if not self._checked:
            self._checked = True
            for number in range(len(self._layers)):
                self._check(number, outputs)
        return outputs

    def outputs_with(self, number: int, edit: Edit, copies: int) -> Tensor:
        """Return the outputs (copies, K) float32 for copies of the recorded image with other values at a layer.

        Args:
            number: Number of the layer.
            edit: Receives the tensor at the layer for `copies` copies of the image, and returns it changed.
            copies: Number of copies.
        """
        if not self.repetitions[number]:
            return self._complete_pass(copies, {number: edit})
        return self._replay(number, edit, copies)

    def _recorded_pass(self) -> Tensor:
        """Run the network on the image, keep what the layers need of it, and return the outputs."""
        wanted = {number: self._layers[number] for number, repetition in enumerate(self.repetitions) if repetition}
        self._calls = {}
        if not wanted:
            return self._complete_pass(1)
        recorder = _Recorder(self._modules, wanted)
        with recorder.attached():
            outputs = self._complete_pass(1)
        for number, layer in wanted.items():
            if number not in recorder.taps:
                raise AtlasError(f"{self._model.name} did not run {layer.name} for a dataset image.")
            self._calls[number] = _calls_before(recorder.calls, recorder.taps[number])
        return outputs

    def _replay(self, number: int, edit: Edit, copies: int) -> Tensor:
        calls = self._calls[number]
        repeat = functools.partial(REPEAT[self.repetitions[number]], copies=copies)
        with _replaced_calls(self._modules, calls, repeat):
            return self._complete_pass(copies, {number: edit}, calls)

    def _check(self, number: int, outputs: Tensor) -> None:
        """Choose the repetition of stored results that gives the outputs of the complete pass."""
        reason, scale = "", float(outputs.abs().max()) or 1.0
        for repetition in (VIEWS, COPIES):
            self.repetitions[number] = repetition
            try:
                replayed = self._replay(number, lambda tensor: tensor, 2)
            except Exception as error:  # whatever the code of a network raises for results that it does not expect
                if is_device_failure(error):
                    raise
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                if float((replayed - outputs).abs().max()) <= TOLERANCE * scale:
                    return
                reason = "the outputs differ"
            # The network may have changed stored results, which other layers use as well.
            self._recorded_pass()
        log.info("%s: ablations run the complete network: %s", self._layers[number].name, reason)
        self.repetitions[number] = ""

    def _complete_pass(
        self, copies: int, edits: Mapping[int, Edit] | None = None, stored: list[_Call] | None = None
    ) -> Tensor:
        """Run the network with an edit at a layer; calls before it may be replaced by stored results."""
        assert self._image is not None
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        def hooked_layer(layer: Layer, edit: Edit) -> contextlib.AbstractContextManager[None]:
            call = _calls_of_module(stored, layer.module, layer.call) if stored else layer.call
            return hooked(self._modules[layer.module], layer.side, {call: edit})

        with contextlib.ExitStack() as stack:
            for number, edit in (edits or {}).items():
                stack.enter_context(hooked_layer(self._layers[number], edit))
            stack.enter_context(hooked_layer(self._outputs, keep))
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
    """Hooks on all modules that store the results of the calls that are finished before the last of some layers.

    Args:
        modules: The modules by path.
        layers: The layers by number.

    Attributes:
        calls: All calls that began before the last layer, in the order in which they began.
        taps: Times at which the tensors of the layers existed, by number.
    """

    def __init__(self, modules: dict[str, nn.Module], layers: Mapping[int, Layer]) -> None:
        self._modules, self._layers = modules, layers
        self._ends = {(layer.module, layer.side) for layer in layers.values()}
        self.calls: list[_Call] = []
        self.taps: dict[int, int] = {}
        self._time = self._last_tap = 0
        self._open: list[_Call] = []
        self._count: Counter[tuple[str, str]] = Counter()

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

    @property
    def _complete(self) -> bool:
        return len(self.taps) == len(self._layers)

    def _advance(self, path: str, side: str) -> bool:
        """Go on to the next begin or end of a call, and note which layers it is; false if it is the last layer."""
        self._time += 1
        end = path, side
        if end not in self._ends:
            return True
        self._count[end] += 1
        for number, layer in self._layers.items():
            if (layer.module, layer.side) == end and layer.call == self._count[end]:
                self.taps[number] = self._last_tap = self._time
        return not self._complete

    def _before(self, path: str) -> Callable[..., None]:
        def before(*_: Any) -> None:
            if self._complete or not self._advance(path, "in"):
                return
            call = _Call(path, self._time)
            self.calls.append(call)
            self._open.append(call)

        return before

    def _after(self, path: str) -> Callable[..., None]:
        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if self._complete or not self._advance(path, "out"):
                return
            call = self._open.pop()
            # The network may change its tensors in place afterwards.
            call.end, call.result = self._time, map_tensors(output, Tensor.clone)
            for inner in reversed(self.calls):
                if inner is call:
                    break
                if inner.end >= self._last_tap:  # no layer lies between the ends of the inner and the outer call
                    inner.result = None

        return after


def _calls_before(calls: list[_Call], tap: int) -> list[_Call]:
    """Return the calls that began before the time of a layer; those finished before it are stored."""
    return [dataclasses.replace(call, stored=call.end < tap) for call in calls if call.start < tap]


def _executed(calls: list[_Call]) -> Iterator[_Call]:
    """Yield the calls that happen when stored results replace calls: all but those inside replaced calls."""
    end = -math.inf
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
