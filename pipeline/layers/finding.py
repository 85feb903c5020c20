"""Find every layer of a network, and capture what it says.

A *layer* is one output of one module call. It is named by the module's path, with `#2` for the second call
of a shared module. The name of a convolution or linear layer stands for its response **before the activation
and after its own normalisation** when that follows directly; every other name stands for the module's output.
"""

import contextlib
import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.core.errors import AtlasError, nearest
from pipeline.layers.layouts import Axes, Layout, Part, as_maps, checked, find_axes
from pipeline.layers.tracing import Call, Trace, class_of, kind_of, modules_of, tensor_of
from pipeline.models.loading import Model


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """Receptive field of a layer, in input pixels: unit (y, x) sees rows `stride[0]*y + offset[0]` and on.

    `size` is (height, width); `offset` is the first row and column that unit (0, 0) sees, negative where
    padding begins.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    offset: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, by where it is tapped (`module`, `call`, `side`) and what comes out there.

    `prefix` and `grid` say how tokens become a map, `part` which of them do. `cost` is the number of
    multiply-adds of one forward pass up to this layer; `field` is None where a unit sees the whole image, or
    where nobody has asked yet. `alias` is the name that the literature uses, if it is another.
    """

    name: str
    kind: str
    module: str
    call: int
    side: Literal["in", "out"]
    layout: Layout
    channels: int
    height: int
    width: int
    cost: float
    field: ReceptiveField | None = None
    prefix: int = 0
    grid: tuple[int, int] | None = None
    part: Part = "patches"
    alias: str = ""

    @property
    def tap(self) -> list[Any]:
        """All that says which numbers this layer gives, for digests."""
        return [self.name, self.module, self.call, self.side, self.layout, self.prefix, self.grid, self.part]

    @property
    def spatial(self) -> bool:
        """Whether the places of its map are places of the picture."""
        patches = self.layout in ("tokens", "tokens_first", "flat") and self.grid is not None and self.part == "patches"
        return patches or self.layout in ("maps", "maps_last")

    def maps(self, output: Tensor, batch: int, size: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        """What the tap gives for `batch` images, `size` times as large as the recipe's, as (B, C, H, W)."""
        return as_maps(output, Axes(self.layout, self.prefix, self.grid), batch, self.part, size)


class _Stop(Exception):
    """Raised in a hook when all wanted layers were seen: what lies behind them is never run."""


@contextlib.contextmanager
def capture(model: Model, layers: Sequence[Layer], each: Any = None, stop: bool = True) -> Iterator[Any]:
    """A function `forward(images) -> {layer name: (B, C, H, W)}`, whose hooks are gone on exit.

    `images` are in [0, 1]. With `each`, every layer's output is handed to `each(layer, maps)` as soon as it
    exists and is not kept. With `stop`, the network is not run past the last wanted layer.
    """
    modules = modules_of(model.module)
    found: dict[str, Any] = {}
    calls: dict[tuple[str, str], int] = {}
    own, batch, size = model.recipe.size, 1, (1.0, 1.0)
    running = False
    handles: list[RemovableHandle] = []

    def see(path: str, side: str, value: Any, wanted: dict[int, list[Layer]]) -> None:
        if not running:
            return  # another capture of the same network runs it, as in the estimate of an ensemble
        calls[path, side] = call = calls.get((path, side), 0) + 1
        tensor = tensor_of(value)
        for layer in wanted.get(call, ()):
            if tensor is None:
                raise AtlasError(f"{layer.name} gives no tensor for these images. layers.exclude leaves it out.")
            maps = layer.maps(tensor, batch, size)
            if maps.dtype == torch.float64:
                maps = maps.float()  # what follows computes in single precision
            found[layer.name] = maps if each is None else None
            if each is not None:
                each(layer, maps)
            elif not stop or len(found) < len(layers):
                # The network goes on, and may add to this very tensor in place.
                found[layer.name] = maps.clone()
        if stop and len(found) == len(layers):
            raise _Stop

    taps: dict[tuple[str, str], dict[int, list[Layer]]] = {}
    for layer in layers:
        taps.setdefault((layer.module, layer.side), {}).setdefault(layer.call, []).append(layer)
    try:
        for (path, side), wanted in taps.items():

            def before(_: nn.Module, args: Any, kwargs: Any, path: str = path, wanted: Any = wanted) -> None:
                see(path, "in", (args, kwargs), wanted)

            def after(_: nn.Module, __: Any, output: Any, path: str = path, wanted: Any = wanted) -> None:
                see(path, "out", output, wanted)

            module = modules[path]
            handles.append(
                module.register_forward_pre_hook(before, with_kwargs=True)
                if side == "in"
                else module.register_forward_hook(after)
            )

        def forward(images: Tensor) -> dict[str, Tensor]:
            nonlocal batch, size, running
            found.clear()
            calls.clear()
            batch, size = images.shape[0], (images.shape[-2] / own[0], images.shape[-1] / own[1])
            images = images.contiguous(memory_format=model.memory_format)
            running = True
            try:
                with contextlib.suppress(_Stop):
                    model.module(model.normalise(images))
            finally:
                running = False
            missing = [layer.name for layer in layers if layer.name not in found]
            if missing:
                raise AtlasError(
                    f"{model.name} did not run {', '.join(missing[:3])} for these images: what it computes depends on "
                    "them. layers.exclude leaves such layers out."
                )
            return dict(found)

        yield forward
    finally:
        for handle in handles:
            handle.remove()
        found.clear()


def enumerate_layers(
    model: Model,
    layouts: Mapping[str, str] | None = None,
    part: Part = "patches",
    prefix: int | None = None,
    aliases: Mapping[str, str] | None = None,
) -> list[Layer]:
    """Every layer of the network in the order of computation, found by a few forward passes on noise.

    `layouts` maps globs on layer names to layouts that are right where the search is wrong. Raises
    `AtlasError` for a network that does not take its own input, has no layer that hooks can reach, or couples
    the images of a batch.
    """
    trace, axes = find_axes(model)
    layers: list[Layer] = []
    outputs: set[int] = set()
    used: set[str] = set()
    for call in trace.calls:
        name = call.name
        found = axes.get(call.key)
        for pattern, layout in (layouts or {}).items():
            if fnmatch.fnmatchcase(name, pattern):
                used.add(pattern)
                found = checked(found or Axes("maps"), layout, call, name)
        if found is None or (not call.path and call.output in outputs):
            continue  # the whole network's output is a layer only where no module inside gives it
        outputs.add(call.output)
        if prefix is not None and found.layout in ("tokens", "tokens_first", "flat"):
            found = dataclasses.replace(found, prefix=prefix)
        module = trace.modules[call.path]
        kind = kind_of(module)
        tap = _tap(trace, call) if kind in ("conv", "linear") else (call.path, call.index, "out")
        layer = _layer(name, kind, tap, found, call, part, aliases or {})
        layers.append(layer)
        hidden = _hidden_projection(trace, call, layer.channels)
        if hidden:
            layers.append(dataclasses.replace(layer, name=name.replace(call.path, hidden, 1), kind="linear"))
    for pattern in layouts or {}:
        if pattern not in used:
            raise AtlasError(
                f"layers.layouts: no layer matches {pattern!r}. {nearest(pattern, [c.path for c in trace.calls])}"
            )
    if not layers:
        raise AtlasError(
            f"{model.name} runs no module whose output has channels, so that there is nothing to hook. What it "
            "computes with functions alone must be put into modules (torch.nn.Conv2d, torch.nn.Linear, …)."
        )
    return layers


def _layer(
    name: str,
    kind: str,
    tap: tuple[str, int, Literal["in", "out"]],
    axes: Axes,
    call: Call,
    part: Part,
    aliases: Mapping[str, str],
) -> Layer:
    if part == "prefix" and not axes.prefix:
        part = "patches"
    maps = as_maps(torch.empty(call.shape, device="meta"), axes, 1, part)
    alias = ""
    for short, path in aliases.items():
        if name == path or name.startswith((f"{path}.", f"{path}#")):
            alias = short + name[len(path) :]
    _, channels, height, width = maps.shape
    return Layer(
        name, kind, *tap, axes.layout, channels, height, width, call.cost,
        prefix=axes.prefix, grid=axes.grid, part=part, alias=alias,
    )  # fmt: skip


def _tap(trace: Trace, call: Call) -> tuple[str, int, Literal["in", "out"]]:
    """Where the response of a convolution or linear layer is read: after the normalisation that is its own.

    Its own is one that reads it directly, and that nothing else reads beside (a container takes the tensor
    too, when the normalisation is its first child).
    """
    readers = trace.readers.get(call.output, [])
    norm = next((c for c in readers if kind_of(trace.modules[c.path]) == "norm"), None)
    if norm is None or norm.shape != call.shape:
        return call.path, call.index, "out"
    for other in readers:
        related = other.path in ("", norm.path) or _inside(norm.path, other.path) or _inside(other.path, norm.path)
        if not related:
            return call.path, call.index, "out"
    # timm fuses norm and activation in one module; what enters its `act` is before the activation.
    fused = f"{norm.path}.act"
    return (fused, norm.index, "in") if fused in trace.modules else (norm.path, norm.index, "out")


def _inside(path: str, container: str) -> bool:
    return path.startswith(f"{container}.")


def _hidden_projection(trace: Trace, call: Call, channels: int) -> str | None:
    """The path of the output projection that an attention module applies as a function, unseen by hooks.

    Its response is what the attention gives: torch's MultiheadAttention (`out_proj`), torchvision's Swin (`proj`).
    """
    module = trace.modules[call.path]
    if kind_of(module) != "attention":
        return None
    for name in ("out_proj", "proj"):
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Module) and issubclass(class_of(projection), nn.Linear):
            path = f"{call.path}.{name}"
            weight = getattr(projection, "weight", None)
            if all(c.path != path for c in trace.calls) and isinstance(weight, Tensor) and len(weight) == channels:
                return path
    return None
