"""Find every layer of a network, choose among them, and capture what they say.

A *layer* is one output of one module call. It is named by the module's path, with `#2` for the second call
of a shared module. The name of a convolution or linear layer stands for its response **before the activation
and after its own normalisation** when that follows directly; every other name stands for the module's output.
"""

import contextlib
import dataclasses
import fnmatch
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.errors import AtlasError, nearest
from pipeline.models import Model

Layout = Literal["maps", "maps_last", "tokens", "vector"]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


@dataclasses.dataclass(frozen=True)
class Field:
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

    `cost` is the number of multiply-adds of one forward pass up to this layer; `field` is None where a unit
    sees the whole image, or where nobody has asked yet.
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
    field: Field | None = None


@dataclasses.dataclass(frozen=True)
class LayersConfig:
    """Which layers and which of their channels; see `choose` and `channels_of`."""

    policy: str = "tour"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    channels: str | int | tuple[int, ...] = "all"
    count: int = 9


class _Stop(Exception):
    """Raised in a hook when all wanted layers were seen: what lies behind them is never run."""


def tensor_of(value: Any) -> Tensor | None:
    """The tensor of a module's output or input: itself, or the first of a tuple (attention)."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def as_maps(output: Tensor, layout: Layout) -> Tensor:
    """Any layer output as (B, C, H, W), so that *channel c* means the same thing everywhere.

    Tokens become a 1 × N map, vectors a 1 × 1 map.
    """
    match layout:
        case "maps":
            return output
        case "maps_last":
            return output.permute(0, 3, 1, 2)
        case "tokens":
            return output.transpose(1, 2).unsqueeze(2)
        case "vector":
            return output[:, :, None, None]


@contextlib.contextmanager
def capture(model: Model, layers: Sequence[Layer], each: Any = None, stop: bool = True) -> Iterator[Any]:
    """A function `forward(images) -> {layer name: (B, C, H, W)}`, whose hooks are gone on exit.

    `images` are in [0, 1]. With `each`, every layer's output is handed to `each(layer, maps)` as soon as it
    exists and is not kept. With `stop`, the network is not run past the last wanted layer.
    """
    modules = dict(model.module.named_modules())
    found: dict[str, Any] = {}
    calls: dict[tuple[str, str], int] = {}
    handles: list[RemovableHandle] = []

    def see(path: str, side: str, value: Any, wanted: dict[int, list[Layer]]) -> None:
        calls[path, side] = call = calls.get((path, side), 0) + 1
        tensor = tensor_of(value)
        for layer in wanted.get(call, ()):
            assert tensor is not None, f"{layer.name} gives no tensor"
            maps = as_maps(tensor, layer.layout)
            found[layer.name] = maps if each is None else None
            if each is not None:
                each(layer, maps)
        if stop and len(found) == len(layers):
            raise _Stop

    taps: dict[tuple[str, str], dict[int, list[Layer]]] = {}
    for layer in layers:
        taps.setdefault((layer.module, layer.side), {}).setdefault(layer.call, []).append(layer)
    try:
        for (path, side), wanted in taps.items():

            def before(_: nn.Module, args: Any, path: str = path, wanted: Any = wanted) -> None:
                see(path, "in", args, wanted)

            def after(_: nn.Module, __: Any, output: Any, path: str = path, wanted: Any = wanted) -> None:
                see(path, "out", output, wanted)

            module = modules[path]
            handles.append(
                module.register_forward_pre_hook(before) if side == "in" else module.register_forward_hook(after)
            )

        def forward(images: Tensor) -> dict[str, Tensor]:
            found.clear()
            calls.clear()
            # Channels-last is the faster layout for convolutions, on CPU and GPU alike.
            images = images.contiguous(memory_format=torch.channels_last)
            with contextlib.suppress(_Stop):
                model.module(model.normalise(images))
            missing = [layer.name for layer in layers if layer.name not in found]
            assert not missing, f"the network did not run {missing}"
            return dict(found)

        yield forward
    finally:
        for handle in handles:
            handle.remove()
        found.clear()


def kind_of(module: nn.Module) -> str:
    """A word for what a module is: conv, linear, norm, pool, attention, activation, block, …"""
    name = type(module).__name__
    if isinstance(module, CONVS):
        return "conv"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, NORMS) or re.search(r"norm", name, re.I):
        return "norm"
    if "pool" in name.lower():
        return "pool"
    if "attention" in name.lower():
        return "attention"
    if any(True for _ in module.children()):
        return "block"
    if type(module).__module__.endswith("activation") or "activation" in type(module).__module__:
        return "activation"
    return name.lower()


def enumerate_layers(model: Model) -> list[Layer]:
    """Every layer of the network in the order of computation, found by one forward pass on noise.

    Layouts are read off the shapes; a 4-D output of a linear or layer-norm module has its channels last.
    """
    trace = Trace(model)
    layers = []
    for call in trace.calls:
        module = trace.modules[call.path]
        kind = kind_of(module)
        layout = _layout(module, call.shape)
        if layout is None:
            continue
        tap, shape, tap_layout = (call.path, call.index, "out"), call.shape, layout
        if kind in ("conv", "linear"):
            follower = next((c for c in trace.calls if call.output in c.inputs), None)
            if follower is not None and kind_of(trace.modules[follower.path]) == "norm" and follower.shape == shape:
                fused = f"{follower.path}.act"
                # timm fuses norm and activation in one module; what enters its `act` is before the activation.
                tap = (
                    (fused, follower.index, "in") if fused in trace.modules else (follower.path, follower.index, "out")
                )
        maps = as_maps(torch.empty(shape, device="meta"), tap_layout)
        layers.append(
            Layer(
                name=call.path + (f"#{call.index}" if call.index > 1 else ""),
                kind=kind,
                module=tap[0],
                call=tap[1],
                side=tap[2],  # type: ignore[arg-type]
                layout=tap_layout,
                channels=maps.shape[1],
                height=maps.shape[2],
                width=maps.shape[3],
                cost=call.cost,
            )
        )
    return layers


@dataclasses.dataclass
class _Call:
    path: str
    index: int
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    output: int
    cost: float


class Trace:
    """All module calls of one forward pass, with which tensor went where."""

    def __init__(self, model: Model) -> None:
        self.modules = dict(model.module.named_modules())
        self.calls: list[_Call] = []
        keep: list[Tensor] = []  # keeps ids unique
        counts: dict[str, int] = {}
        spent = 0.0

        def after(path: str, module: nn.Module, args: Any, output: Any) -> None:
            nonlocal spent
            counts[path] = index = counts.get(path, 0) + 1
            tensor = tensor_of(output)
            if tensor is None or not tensor.is_floating_point() or tensor.shape[0] != 1:
                return
            if isinstance(module, (*CONVS, nn.Linear)):
                weight = module.weight
                spent += tensor.numel() * weight.numel() / weight.shape[0]
            inputs = tuple(id(a) for a in args if isinstance(a, Tensor))
            keep.extend(a for a in args if isinstance(a, Tensor))
            keep.append(tensor)
            self.calls.append(_Call(path, index, tuple(tensor.shape), inputs, id(tensor), spent))

        handles = [
            module.register_forward_hook(lambda m, a, o, path=path: after(path, m, a, o))
            for path, module in self.modules.items()
            if path
        ]
        try:
            device = next(iter(model.module.parameters())).device
            image = torch.zeros(1, model.recipe.channels, *model.recipe.size, device=device)
            with torch.no_grad():
                model.module(model.normalise(image))
        finally:
            for handle in handles:
                handle.remove()


def _layout(module: nn.Module, shape: tuple[int, ...]) -> Layout | None:
    if len(shape) == 2:
        return "vector"
    if len(shape) == 3:
        return "tokens"
    if len(shape) == 4:
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and type(module).__name__ != "LayerNorm2d":
            return "maps_last"
        return "maps_last" if shape[1] == shape[2] != shape[3] else "maps"
    return None


def choose(model: Model, layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """The layers that the configuration asks for, in the order of computation.

    `include` beside the default policy chooses exactly the modules it matches, of whatever kind; beside any
    other policy it narrows that policy down.
    """
    if config.policy not in POLICIES:
        raise AtlasError(f"layers.policy={config.policy!r} is unknown. {nearest(config.policy, POLICIES)}")
    if config.include and config.policy == "tour":
        chosen = list(layers)
    else:
        chosen = POLICIES[config.policy](model, layers, config)
    for key, patterns in (("include", config.include), ("exclude", config.exclude)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in layers):
                names = [layer.name for layer in layers]
                raise AtlasError(f"layers.{key}: no layer matches {pattern!r}. {nearest(pattern, names)}")
    if config.include:
        chosen = [la for la in chosen if any(fnmatch.fnmatchcase(la.name, p) for p in config.include)]
    chosen = [la for la in chosen if not any(fnmatch.fnmatchcase(la.name, p) for p in config.exclude)]
    if not chosen:
        raise AtlasError(
            f"layers: nothing is left of policy {config.policy!r} after include and exclude. "
            "`atlas plan layers=all` lists every layer."
        )
    return chosen


def channels_of(layer: Layer, channels: str | int | Sequence[int]) -> tuple[int, ...]:
    """Channel numbers of one layer from `layers.channels`.

    `all`, a slice (`0:12`, `::64`), `spread:12` (twelve, evenly over the layer), a number, or a list.
    Slices stop at the layer's end; a number in a list beyond it is left out of that layer.
    """
    n = layer.channels
    if isinstance(channels, int):
        channels = (channels,)
    if not isinstance(channels, str):
        return tuple(sorted({c for c in channels if 0 <= c < n}))
    if channels == "all":
        return tuple(range(n))
    if match := re.fullmatch(r"spread:(\d+)", channels):
        count = min(int(match[1]), n)
        return tuple(sorted({(2 * i + 1) * n // (2 * count) for i in range(count)}))
    if re.fullmatch(r"\d*:\d*(:[1-9]\d*)?", channels):
        return tuple(range(n)[slice(*(int(p) if p else None for p in channels.split(":")))])
    raise AtlasError(f"layers.channels={channels!r}: use all, 0:12, ::64, spread:12, a number or a list [3,7].")


def _all(model: Model, layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    return list(layers)


def _convs(model: Model, layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """Every convolution and linear layer."""
    return [layer for layer in layers if layer.kind in ("conv", "linear")]


def _blocks(model: Model, layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """Outputs of stages and residual blocks.

    A candidate is a container with at least two convolutions or linears that work on the whole map (those of
    squeeze-and-excite work on one position). It is a *stage* if it lists candidates, else a *block*; what lies
    inside a block (its branches, its MLP) is left out. Of several that end in the same tensor (a stage and its
    last block) the innermost is kept.
    """
    trace = Trace(model)
    modules = trace.modules
    shapes = {call.path: call.shape for call in trace.calls}

    def weight(path: str) -> int:
        inner = [f"{path}.{name}" for name, m in modules[path].named_modules() if isinstance(m, (*CONVS, nn.Linear))]
        pooled = len(shapes.get(path, ())) == 4 and max(shapes[path][2:]) > 1
        return sum(not (pooled and len(shape := shapes.get(p, ())) == 4 and max(shape[2:]) == 1) for p in inner)

    def lists(path: str) -> bool:
        own = modules[path]
        members = [(path, own), *((f"{path}.{name}", child) for name, child in own.named_children())]
        return any(
            weight(f"{base}.{name}") >= 2
            for base, module in members
            if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
            for name, child in module.named_children()
            if any(True for _ in child.children())
        )

    heavy = {la.module for la in layers if la.kind in ("block", "attention") and weight(la.module) >= 2}
    blocks = {path for path in heavy if not lists(path)}
    outputs = {(call.path, call.index): call.output for call in trace.calls}
    kept: dict[int, Layer] = {}
    for layer in layers:
        parents = layer.module.split(".")
        inside = any(".".join(parents[:i]) in blocks for i in range(1, len(parents)))
        if layer.module in heavy and layer.name.partition("#")[0] == layer.module and not inside:
            # Calls are listed as they end, the innermost first.
            kept.setdefault(outputs[layer.module, layer.call], layer)
    return list(kept.values())


def _logits(model: Model, layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """The classifier: the last linear layer or, in fully convolutional heads, the last convolution."""
    return [[layer for layer in layers if layer.kind in ("conv", "linear")][-1]]


def _tour(model: Model, layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """`count` layers from stem to logits: the first and last, and block outputs evenly between them."""
    ends = _convs(model, layers, config)
    middle = [la for la in _blocks(model, layers, config) if ends[0].cost < la.cost < ends[-1].cost]
    if len(middle) < min(config.count - 2, 3):
        middle = ends[1:-1]  # a plain chain of layers, as in VGG
    wanted = min(max(config.count - 2, 0), len(middle))
    picked = [middle[(2 * i + 1) * len(middle) // (2 * wanted)] for i in range(wanted)]
    return [la for la in layers if la in (ends[0], *picked, ends[-1])]


POLICIES = {"tour": _tour, "convs": _convs, "blocks": _blocks, "logits": _logits, "all": _all}
