"""Which layers, and which of their channels: policies, globs, aliases and channel ranges."""

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import get_args

from torch import nn

from pipeline.core.errors import AtlasError, nearest
from pipeline.layers.finding import Layer, enumerate_layers
from pipeline.layers.layouts import Part
from pipeline.layers.tracing import Trace, kind_of, trace_of
from pipeline.models.loading import Model


@dataclasses.dataclass(frozen=True)
class LayersConfig:
    """Which layers and which of their channels; see `choose` and `channels_of`.

    `layouts` overrides, by glob on layer names, where the channel axis is; `tokens` says which tokens of a
    transformer's layer make its map, and `prefix` how many of them are no patches, where that is not found.
    """

    policy: str = "tour"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    channels: str | int | tuple[int, ...] = "all"
    count: int = 9
    layouts: Mapping[str, str] | None = None
    tokens: str = "patches"
    prefix: int | None = None


def found_layers(model: Model, config: LayersConfig, aliases: Mapping[str, str] | None = None) -> list[Layer]:
    """Every layer of the network, laid out as the configuration says."""
    part = next((p for p in get_args(Part) if p == config.tokens), None)
    if part is None:
        raise AtlasError(f"layers.tokens={config.tokens!r} is unknown. {nearest(config.tokens, get_args(Part))}")
    if config.prefix is not None and config.prefix < 0:
        raise AtlasError(f"layers.prefix={config.prefix} is too small: at least 0, or null to find it.")
    return enumerate_layers(model, config.layouts, part, config.prefix, aliases)


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
    chosen = narrowed(chosen, layers, config)
    if not chosen:
        raise AtlasError(
            f"layers: nothing is left of layers={config.policy} after layers.include and layers.exclude. "
            "`atlas plan layers=all` lists every layer."
        )
    return chosen


def narrowed(chosen: Sequence[Layer], layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """Those of the `chosen` of all `layers` that `include` and `exclude` leave; each pattern must match some layer."""
    for key, patterns in (("include", config.include), ("exclude", config.exclude)):
        for pattern in patterns:
            if not any(_matches(layer, pattern) for layer in layers):
                names = [name for layer in layers for name in (layer.name, layer.alias) if name]
                raise AtlasError(f"layers.{key}: no layer matches {pattern!r}. {nearest(pattern, names)}")
    if config.include:
        chosen = [la for la in chosen if any(_matches(la, p) for p in config.include)]
    return [la for la in chosen if not any(_matches(la, p) for p in config.exclude)]


def _matches(layer: Layer, pattern: str) -> bool:
    """Whether a glob is of a layer's name, or of the name that the literature has for it."""
    return fnmatch.fnmatchcase(layer.name, pattern) or fnmatch.fnmatchcase(layer.alias, pattern)


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
    trace = trace_of(model)
    modules = trace.modules
    shapes = {call.path: call.shape for call in trace.calls}

    def weight(path: str) -> int:
        inner = [f"{path}.{name}" for name, m in modules[path].named_modules() if kind_of(m) in ("conv", "linear")]
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

    inner = [la for la in layers if la.module and la.kind in ("block", "attention")]
    heavy = {la.module for la in inner if weight(la.module) >= 2}
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
    """The classifier's layer or layers; see `logit_layers`."""
    found = logit_layers(model, layers)
    if not found:
        raise AtlasError(
            f"{model.name} has no classifier: no linear layer or convolution gives its output. Choose other layers, as "
            "layers=convs."
        )
    return found


def logit_layers(model: Model, layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers of logits: what gives the network's output; empty for backbones, towers of maps, detectors.

    The last linear layer or, in a fully convolutional head (SqueezeNet, a segmentation network), the last convolution
    that no normalization follows, if only activations, pooling and functions lie between it and the output. With a
    linear layer come other vectors of as many channels that no module reads: a distilled transformer has two heads.
    """
    ends = _convs(model, layers, LayersConfig())
    if not ends:
        return []
    last = ends[-1]
    trace = trace_of(model)
    if not _gives_output(trace, last):
        return []
    if last.layout != "vector":
        return [last]
    same = [la for la in ends if la.layout == "vector" and la.channels == last.channels]
    read = {c.key for c in trace.calls if any(r.path and r.path != c.path for r in trace.readers.get(c.output, ()))}
    return [la for la in same if la is last or (la.module, la.call) not in read]


# Modules between a layer of logits and the output that leave its channels what they are.
BEHIND_LOGITS = ("activation", "pool", "dropout", "flatten", "identity")


def _gives_output(trace: Trace, layer: Layer) -> bool:
    """Whether a linear layer or convolution gives the network's output, but for activations, pooling and functions."""
    whole = next((call for call in trace.calls if not call.path), None)
    own = next((c for c in trace.calls if (c.path, c.index) == (layer.module, layer.call)), None)
    if own is None or layer.side == "in" or kind_of(trace.modules[own.path]) == "norm":
        return False  # a normalization follows
    if whole is None:
        return layer.layout == "vector"  # an output without channels, as of one class
    inner = {identity for call in trace.calls if call.path for identity in call.results}
    reached = {own.output}
    for call in trace.calls:
        kind = kind_of(trace.modules[call.path])
        if call.path and kind in BEHIND_LOGITS and reached & set(call.inputs):
            reached.add(call.output)
    if reached & set(whole.results):
        return True
    # Functions gave the output; it is this layer's if it has its channels.
    axis = -1 if layer.layout in ("maps_last", "tokens", "windows") else 1
    return not (inner & set(whole.results)) and whole.shape[axis] == layer.channels


def _tour(model: Model, layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """`count` layers from stem to logits: the first and last, and block outputs evenly between them."""
    ends = _convs(model, layers, config)
    if len(ends) < 2:
        return list(layers)
    middle = [la for la in _blocks(model, layers, config) if ends[0].cost < la.cost < ends[-1].cost]
    if len(middle) < min(config.count - 2, 3):
        middle = ends[1:-1]  # a plain chain of layers, as in VGG
    wanted = min(max(config.count - 2, 0), len(middle))
    picked = [middle[(2 * i + 1) * len(middle) // (2 * wanted)] for i in range(wanted)]
    return [la for la in layers if la in (ends[0], *picked, ends[-1])]


POLICIES = {"tour": _tour, "convs": _convs, "blocks": _blocks, "logits": _logits, "all": _all}
