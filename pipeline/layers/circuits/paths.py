"""The linear path from one layer of a network to a later one: effective weights between their channels.

The effective weight of a source channel on a target channel is the gradient of the target's activation at the middle of
its map with respect to the source's map, in the network that is made linear between the two
(`linearized.LinearGradients`). It is a small signed kernel. Sums of branches, such as residual additions, add up in it.
"""

import contextlib
import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.kernels.device_errors import is_device_failure
from pipeline.layers.circuits.kernels import KERNEL_SIDE
from pipeline.layers.circuits.linearized import LinearGradients, Passed
from pipeline.layers.finding import Layer
from pipeline.layers.tracing import modules_of, run_on_noise, tensor_of
from pipeline.models.loading import Model

# Channels of the target whose weights are yielded together.
BATCH = 16
# Kinds of layers that mix the channels before them.
MIXING = ("conv", "linear", "dictionary")
# Sides of images are multiples of this, in pixels.
SIZE_STEP = 32


class _TargetReached(Exception):
    """Raised to end the forward pass at the target."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Effective weights on some target channels.

    Attributes:
        norm: L2 norms of the complete kernels, (O, I) float32.
        sum: Sums of the complete kernels, (O, I) float32.
        kernel: The kernels, cropped to their middle, (O, I, k, k') float32.
        residual: Sums of the kernels along the paths that go around all modules of `LinearPath.bypassed`, (O, I)
            float32; None if there are no such paths.
    """

    norm: np.ndarray
    sum: np.ndarray
    kernel: np.ndarray
    residual: np.ndarray | None


class LinearPath:
    """The linear path between two layers.

    Args:
        model: The network, on a CPU; its normalizations must not be folded.
        source: The earlier layer.
        target: The later layer.

    Attributes:
        connected: Whether a gradient reaches the source.
        mixes: Whether a convolution or linear layer lies between, among them the target's own.
        path: Paths of the convolutions and linear layers between the two, without the target's own.
        bypassed: Those of `path` that a residual path or a parallel branch goes around.
        gated: Paths of the activation functions between the two.
        approximate: Paths of modules that are linear only because something was held constant or was replaced.
    """

    def __init__(self, model: Model, source: Layer, target: Layer) -> None:
        self._model, self._source, self._target = model, source, target
        self.mixes = False
        self.path: tuple[str, ...] = ()
        self.bypassed: tuple[str, ...] = ()
        self.gated: tuple[str, ...] = ()
        self.approximate: tuple[str, ...] = ()
        self._residual: tuple[Tensor, Tensor] | None = None
        self._size = model.preprocessing.size
        graph, passed, stopped = self._graph()
        self.connected = graph is not None and not stopped and _reaches(graph)
        if graph is None or not self.connected:
            return
        self._complete = graph
        self._describe(passed)
        self._window = self._support()
        self._shrink()
        self._find_residual()

    def _graph(self, blocked: Collection[str] = ()) -> tuple[tuple[Tensor, Tensor] | None, list[Passed], bool]:
        """Run the network on noise; return the source's tensor and the target's maps, or None, and what is between.

        Args:
            blocked: Paths of modules whose outputs pass no gradient.
        """
        mode, kept = LinearGradients(), {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(_taps(self._model.module, self._source, self._target, mode, kept))
            stack.enter_context(mode.watching(self._model.module))
            modules = modules_of(self._model.module)
            for path in blocked:
                handle = modules[path].register_forward_hook(lambda _module, _args, output: output.detach())
                stack.callback(handle.remove)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(mode)
            stack.enter_context(contextlib.suppress(_TargetReached))
            run_on_noise(self._model, self._size)
        if "source" not in kept or "target" not in kept or not kept["target"].requires_grad:
            return None, [], mode.stopped
        maps = self._target.ungated.maps(kept["target"], 1)
        return (kept["source"], maps), mode.passed, mode.stopped

    def _describe(self, passed: Sequence[Passed]) -> None:
        """Set `path`, `gated` and `approximate` from what the values of the source pass on their way to the target."""
        _, maps = self._complete
        tensors = [one.tensor for one in passed]
        if not tensors:
            return
        found = torch.autograd.grad(maps.sum(), tensors, retain_graph=True, allow_unused=True)
        between = [one for one, gradient in zip(passed, found, strict=True) if gradient is not None]
        own = self._target.name.partition("#")[0]
        mixing = [one for one in between if one.mixes and one.path != self._source.name.partition("#")[0]]
        self.mixes = bool(mixing) or self._target.kind in MIXING
        self.path = tuple(dict.fromkeys(one.path for one in mixing if one.path != own))
        self.gated = tuple(dict.fromkeys(one.path for one in between if one.gated))
        self.approximate = tuple(dict.fromkeys(one.path for one in between if one.approximate))
        nodes = {path: {one.tensor.grad_fn for one in mixing if one.path == path} for path in self.path}
        self.bypassed = tuple(path for path in self.path if _reaches(self._complete, nodes[path]))

    def _shrink(self) -> None:
        """Use a smaller image if the kernels fit into its maps too: most of a large map is out of their reach."""
        lengths = [window.stop - window.start for window in self._window]
        maps, full, complete = self._source.maps(self._complete[0], 1), self._size, self._complete
        spare = max((length + 4) / side for length, side in zip(lengths, maps.shape[2:], strict=True))
        if {self._source.layout, self._target.layout} != {"maps"} or max(lengths) >= KERNEL_SIDE:
            return
        self._size = tuple(min(side, math.ceil(spare * side / SIZE_STEP) * SIZE_STEP) for side in full)  # type: ignore[assignment]
        if self._size == full:
            return
        window = self._window
        try:
            graph = self._graph()[0]
        except Exception as error:
            if is_device_failure(error):
                raise
            graph = None
        if graph is not None:
            self._complete = graph
            self._window = self._support()
            if [one.stop - one.start for one in self._window] == [one.stop - one.start for one in window]:
                return
        self._size, self._complete, self._window = full, complete, window

    def _find_residual(self) -> None:
        """Set the graph of the paths around all modules of `bypassed`, if there are any."""
        if not self.bypassed:
            return
        graph, _, _ = self._graph(self.bypassed)
        if (
            graph is not None
            and torch.autograd.grad(graph[1].sum(), graph[0], retain_graph=True, allow_unused=True)[0] is not None
        ):
            self._residual = graph

    @property
    def has_residual(self) -> bool:
        """Whether there are paths around all modules of `bypassed`."""
        return self._residual is not None

    def _middle(self, maps: Tensor) -> Tensor:
        """Return the values of all channels at the middle of the map, (O,)."""
        return maps[0, :, maps.shape[2] // 2, maps.shape[3] // 2]

    def _support(self) -> tuple[slice, slice]:
        """Return the rows and columns of the source that the middle of the target depends on, or their middle."""
        source, maps = self._complete
        middle = self._middle(maps)
        # Signs that cannot cancel each other in all channels at once.
        signs = torch.rand(middle.shape, generator=torch.Generator().manual_seed(1)).to(middle) + 0.5
        (gradient,) = torch.autograd.grad((middle * signs).sum(), source, retain_graph=True)
        used = self._source.slopes(gradient, 1)[0].abs().sum(0)
        return _window(used.amax(1)), _window(used.amax(0))

    def weights(self, channels: Sequence[int]) -> Iterator[tuple[list[int], Weights]]:
        """Yield the effective weights on target channels, some channels at a time."""
        for start in range(0, len(channels), BATCH):
            part = list(channels[start : start + BATCH])
            full = self._gradients(self._complete, part)
            residual = None
            if self._residual is not None:
                residual = self._gradients(self._residual, part).sum((2, 3)).cpu().numpy()
            flat = full.flatten(2)
            kernel = full[:, :, self._window[0], self._window[1]]
            arrays = (flat.norm(dim=2), flat.sum(2), kernel)
            norm, total, kernels = (array.cpu().numpy() for array in arrays)
            yield part, Weights(norm, total, kernels, residual)

    def _gradients(self, graph: tuple[Tensor, Tensor], channels: Sequence[int]) -> Tensor:
        """Return the gradients of target channels with respect to the source's maps, (len(channels), I, H, W)."""
        source, maps = graph
        values = self._middle(maps)[list(channels)]
        return torch.stack([self._source.slopes(one, 1)[0] for one in gradients_of(values, source)]).float()


def _reaches(graph: tuple[Tensor, Tensor], blocked: Collection[Any] = ()) -> bool:
    """Return whether the gradient of the target reaches the source without passing some nodes of the graph."""
    source, maps = graph
    waiting, seen = [maps.grad_fn], set(blocked)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is source:
            return True
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
    return False


def gradients_of(values: Tensor, source: Tensor) -> Tensor:
    """Return the gradient of each of some values, (n,), with respect to a tensor, as (n, *source.shape)."""
    found = [torch.autograd.grad(one, source, retain_graph=True, allow_unused=True)[0] for one in values]
    return torch.stack([torch.zeros_like(source) if one is None else one for one in found])


def _window(used: Tensor) -> slice:
    """Return the middle `KERNEL_SIDE` of the range of positions, (n,), that are used."""
    places = torch.nonzero(used).flatten()
    if not len(places):
        return slice(0, min(len(used), 1))
    first, length = int(places[0]), int(places[-1] - places[0]) + 1
    start = first + max(0, (length - KERNEL_SIDE) // 2)
    return slice(start, start + min(length, KERNEL_SIDE))


@contextlib.contextmanager
def _taps(
    module: nn.Module, source: Layer, target: Layer, mode: LinearGradients, kept: dict[str, Tensor]
) -> Iterator[None]:
    """Put a leaf in place of the source's tensor during a pass, and keep it and the target's tensor."""
    modules = modules_of(module)

    def replace(tensor: Tensor) -> Tensor:
        kept["source"], copy = mode.source(tensor)
        return copy

    def keep(tensor: Tensor) -> None:
        kept["target"] = tensor
        raise _TargetReached

    with contextlib.ExitStack() as stack:
        for layer, act in ((target, keep), (source, replace)):
            stack.callback(_tap(modules[layer.module], layer, act).remove)
        yield


def _tap(module: nn.Module, layer: Layer, act: Any) -> Any:
    """Call `act` with the tensor of a layer; what it returns takes its place."""
    calls = 0

    def reached(value: Any) -> Any:
        nonlocal calls
        calls += 1
        tensor = tensor_of(value)
        if calls != layer.call or tensor is None:
            return None
        changed = act(tensor)
        return None if changed is None else _with_first(value, changed)

    if layer.side == "in":
        return module.register_forward_pre_hook(lambda _module, args: reached(args))
    return module.register_forward_hook(lambda _module, _args, output: reached(output))


def _with_first(value: Any, tensor: Tensor) -> Any:
    """Return an input or output of a module with its first tensor replaced; nested ones are not changed."""
    if isinstance(value, Tensor):
        return tensor
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return (tensor, *value[1:])
    return value
