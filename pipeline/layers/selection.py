"""Select layers and channels by policy, by globs on layer names and aliases, and by channel ranges."""

import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field
from torch import nn

from pipeline.core.errors import AtlasError, nearest_names
from pipeline.core.validation import Use
from pipeline.layers.attention import with_attention
from pipeline.layers.dictionaries import SEPARATOR, channel_layers
from pipeline.layers.dictionary_files import with_dictionaries
from pipeline.layers.finding import Layer, enumerate_layers
from pipeline.layers.layouts import Part
from pipeline.layers.pixel_kernels import linear_in_pixels
from pipeline.layers.tracing import Call, Trace, kind_of, trace_of
from pipeline.models.loading import Model


@dataclasses.dataclass(frozen=True)
class LayersConfig:
    """Selection of layers and channels.

    Attributes:
        policy: Name of a selection in `POLICIES`.
        include: Globs on layer names and aliases; see `choose`.
        exclude: Globs of layers to leave out.
        channels: Channels of each layer; see `channels_of`.
        visualized: Those of them that get visualizations, as in `visualized_of`; the others have dataset examples only.
        count: Number of layers of the policy `tour`.
        layouts: Layouts by glob on layer names, for layers whose channel axis is not detected correctly.
        tokens: Which tokens of a transformer layer make up its map: patches, all, prefix, class or registers.
        prefix: Number of tokens that are not patches; None to detect it.
        dictionary: Dictionaries whose latents are units, as FILE@LAYER; see `dictionary_files.read_dictionary`.
        heads: Whether attention heads are units, in layers of their own; see `attention`.
    """

    policy: str = "tour"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    channels: str | int | tuple[int, ...] = "all"
    visualized: str | int | tuple[int, ...] = "all"
    count: Annotated[int, Field(ge=1)] = 9
    layouts: Mapping[str, str] | None = None
    tokens: str = "patches"
    prefix: int | None = None
    dictionary: Annotated[str | tuple[str, ...], Use("FILE@LAYER, as in sae.safetensors@blocks.5.3, or a list")] = ()
    heads: bool = False

    @property
    def dictionaries(self) -> tuple[str, ...]:
        """The dictionaries."""
        return (self.dictionary,) if isinstance(self.dictionary, str) else self.dictionary

    def within(self, folder: Path) -> "LayersConfig":
        """Return the settings with paths of dictionaries that do not depend on the working directory."""
        if not self.dictionaries:
            return self
        parts = [text.rpartition(SEPARATOR) for text in self.dictionaries]
        absolute = tuple(f"{folder / Path(path).expanduser()}{sign}{layer}" for path, sign, layer in parts)
        return dataclasses.replace(self, dictionary=absolute)


def list_layers(model: Model, config: LayersConfig, aliases: Mapping[str, str] | None = None) -> list[Layer]:
    """Return all layers of a network, with the layouts and tokens of the configuration.

    Args:
        model: The network.
        config: The settings; those of tokens, layouts, dictionaries and heads are used.
        aliases: Module paths by the names that the literature uses.

    Raises:
        AtlasError: If a setting is invalid, or if the layers can't be found; see `enumerate_layers`.
    """
    part = next((part for part in get_args(Part) if part == config.tokens), None)
    if part is None:
        raise AtlasError(f"layers.tokens={config.tokens!r} is unknown. {nearest_names(config.tokens, get_args(Part))}")
    if config.prefix is not None and config.prefix < 0:
        raise AtlasError(f"layers.prefix={config.prefix} is negative: use a number of tokens, or null to detect it.")
    layers = enumerate_layers(model, config.layouts, part, config.prefix, aliases)
    linear = linear_in_pixels(model, layers)
    layers = [dataclasses.replace(layer, linear_in_pixels=layer.name in linear) for layer in layers]
    if part in ("class", "registers") and all(layer.part != part for layer in layers):
        raise AtlasError(
            f"layers.tokens={part}, but no layer of {model.name} has such tokens. Use layers.tokens=patches; "
            "layers.prefix says how many tokens at the start are no patches, if that is not detected."
        )
    if config.heads:
        layers = with_attention(model, layers)
    return with_dictionaries(layers, config.dictionaries)


def select_layers(model: Model, layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """Return the selected layers in the order of computation.

    With the default policy (`tour`), `include` selects from all layers of any kind. With any other policy it selects
    from the layers of the policy.

    Args:
        model: The network.
        layers: All layers of the network.
        config: The settings; `policy`, `include`, `exclude` and `count` are used. Layers of latents and heads are part
            of every policy.

    Raises:
        AtlasError: If the policy is unknown, if a glob matches no layer, or if no layer remains.
    """
    if config.policy not in POLICIES:
        raise AtlasError(f"layers.policy={config.policy!r} is unknown. {nearest_names(config.policy, POLICIES)}")
    if config.include and config.policy == "tour":
        candidates = list(layers)
    else:
        candidates = POLICIES[config.policy](model, channel_layers(layers), config)
        if computed := [layer for layer in layers if not layer.of_channels]:
            names = {layer.name for layer in (*candidates, *computed)}
            candidates = [layer for layer in layers if layer.name in names]
    selected = filter_layers(candidates, layers, config)
    if not selected:
        raise AtlasError(
            f"layers={config.policy} with layers.include and layers.exclude selects no layer. "
            "`atlas plan layers=all` lists all layers."
        )
    return selected


def filter_layers(candidates: Sequence[Layer], layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """Return the candidates that match `include`, if there are any globs in it, and do not match `exclude`.

    Args:
        candidates: The layers to select from.
        layers: All layers of the network.
        config: The settings.

    Raises:
        AtlasError: If a glob matches none of `layers`.
    """
    for key, patterns in (("include", config.include), ("exclude", config.exclude)):
        for pattern in patterns:
            if not any(matches(layer, pattern) for layer in layers):
                names = [name for layer in layers for name in (layer.name, layer.alias) if name]
                raise AtlasError(f"layers.{key}: no layer matches {pattern!r}. {nearest_names(pattern, names)}")
    included = [
        layer
        for layer in candidates
        if not config.include or any(matches(layer, pattern) for pattern in config.include)
    ]
    return [layer for layer in included if not any(matches(layer, pattern) for pattern in config.exclude)]


def matches(layer: Layer, pattern: str) -> bool:
    """Return whether a glob matches the name or the alias of a layer."""
    return fnmatch.fnmatchcase(layer.name, pattern) or fnmatch.fnmatchcase(layer.alias, pattern)


def channels_of(layer: Layer, channels: str | int | Sequence[int], key: str = "layers.channels") -> tuple[int, ...]:
    """Return the selected channels of one layer.

    Args:
        layer: The layer.
        channels: "all", a slice ("0:12", "::64"), "spread:12" (twelve channels, evenly over the layer), a number, or
            several numbers. Numbers beyond the channels of the layer are ignored.
        key: The setting, for the error message.

    Raises:
        AtlasError: If `channels` is another string.
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
        return tuple(range(n)[slice(*(int(number) if number else None for number in channels.split(":")))])
    raise AtlasError(f"{key}={channels!r}: use all, 0:12, ::64, spread:12, a number or a list [3,7].")


def visualized_of(layer: Layer, channels: Sequence[int], visualized: str | int | Sequence[int]) -> tuple[int, ...]:
    """Return those of the selected channels of a layer that get visualizations.

    Args:
        layer: The layer.
        channels: Its selected channels, ascending.
        visualized: As `channels` in `channels_of`; "spread:12" are twelve of the selected ones, evenly.

    Raises:
        AtlasError: If `visualized` is another string.
    """
    if isinstance(visualized, str) and visualized.startswith("spread:"):
        selected = dataclasses.replace(layer, channels=len(channels))
        return tuple(channels[place] for place in channels_of(selected, visualized, "layers.visualized"))
    return tuple(sorted(set(channels) & set(channels_of(layer, visualized, "layers.visualized"))))


def _all(model: Model, layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """Return all layers."""
    return list(layers)


def _convs(model: Model, layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """Return all convolutions and linear layers."""
    return [layer for layer in layers if layer.kind in ("conv", "linear")]


def _blocks(model: Model, layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """Return the outputs of stages and residual blocks.

    A candidate is a block or attention module with at least two convolutions or linear layers that are applied to the
    whole map (those of squeeze-and-excite are applied to one position). A candidate that contains a list of candidates
    is a *stage*, any other a *block*; modules inside a block (its branches, its MLP) are left out. If several
    candidates return the same tensor (a stage and its last block), the innermost one is selected.
    """
    trace = trace_of(model)
    shapes = {call.path: call.shape for call in trace.calls}
    modules = [layer.module for layer in layers if layer.module and layer.kind in ("block", "attention")]
    candidates = {path for path in modules if _num_weighted(trace, shapes, path) >= 2}
    blocks = {path for path in candidates if not _is_stage(trace, shapes, path)}
    outputs = {call.key: call.output for call in trace.calls}
    selected: dict[int, Layer] = {}
    for layer in layers:
        parents = layer.module.split(".")
        is_inside = any(".".join(parents[:i]) in blocks for i in range(1, len(parents)))
        if layer.module in candidates and layer.name.partition("#")[0] == layer.module and not is_inside:
            # Calls are listed in the order in which they return, the innermost first.
            selected.setdefault(outputs[layer.module, layer.call], layer)
    return list(selected.values())


def blocks_before(model: Model, layers: Sequence[Layer], end: Layer) -> list[Layer]:
    """Return the outputs of blocks before a layer, in their order; convolutions for a network without blocks."""
    blocks = _blocks(model, layers, LayersConfig()) or _convs(model, layers, LayersConfig())
    return [layer for layer in blocks if layer.cost < end.cost]


def _num_weighted(trace: Trace, shapes: Mapping[str, tuple[int, ...]], path: str) -> int:
    """Return the number of convolutions and linear layers inside a module.

    If the module returns a map, layers that return a single position are not counted.

    Args:
        trace: A trace of the network.
        shapes: Output shapes by module path.
        path: Path of the module.
    """
    inner = [
        f"{path}.{name}"
        for name, module in trace.modules[path].named_modules()
        if kind_of(module) in ("conv", "linear")
    ]
    shape = shapes.get(path, ())
    if len(shape) != 4 or max(shape[2:]) <= 1:
        return len(inner)
    return sum(not _is_single_position(shapes.get(inner_path, ())) for inner_path in inner)


def _is_single_position(shape: tuple[int, ...]) -> bool:
    """Return whether a shape is (B, C, 1, 1)."""
    return len(shape) == 4 and max(shape[2:]) == 1


def _is_stage(trace: Trace, shapes: Mapping[str, tuple[int, ...]], path: str) -> bool:
    """Return whether a module, or one of its children, is a list that contains a candidate; see `_blocks`."""
    module = trace.modules[path]
    members = [(path, module), *((f"{path}.{name}", child) for name, child in module.named_children())]
    for member_path, member in members:
        if not isinstance(member, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            continue
        for name, child in member.named_children():
            has_children = any(True for _ in child.children())
            if has_children and _num_weighted(trace, shapes, f"{member_path}.{name}") >= 2:
                return True
    return False


def _logits(model: Model, layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """Return the layers of logits; see `logit_layers`.

    Raises:
        AtlasError: If there are none.
    """
    heads = logit_layers(model, layers)
    if not heads:
        raise AtlasError(
            f"{model.name} has no classifier: no linear layer or convolution gives its output. Select other layers, "
            "for example layers=convs."
        )
    return heads


def logit_layers(model: Model, layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers of logits, which compute the output of the network; empty for backbones and detectors.

    A layer of logits is the last linear layer or, in a fully convolutional head (SqueezeNet, semantic segmentation),
    the last convolution without a normalization after it, if only activations, pooling and functions follow. Other
    vectors with the same number of channels that no module reads are included: a distilled transformer has two heads.
    """
    weighted = _convs(model, layers, LayersConfig())
    if not weighted:
        return []
    last = weighted[-1]
    trace = trace_of(model)
    if not _gives_output(trace, last):
        return []
    if last.layout != "vector":
        return [last]
    heads = [layer for layer in weighted if layer.layout == "vector" and layer.channels == last.channels]
    read = {call.key for call in trace.calls if _is_read(trace, call)}
    return [layer for layer in heads if layer is last or (layer.module, layer.call) not in read]


def _is_read(trace: Trace, call: Call) -> bool:
    """Return whether another module than the network itself reads the output of a call."""
    return any(reader.path and reader.path != call.path for reader in trace.readers.get(call.output, ()))


# Kinds of modules between a layer of logits and the output that do not change the meaning of channels.
KINDS_AFTER_LOGITS = ("activation", "pool", "dropout", "flatten", "identity")


def _gives_output(trace: Trace, layer: Layer) -> bool:
    """Return whether the output of the network is that of `layer`, after activations, pooling and functions only."""
    network = next((call for call in trace.calls if not call.path), None)
    producer = next((call for call in trace.calls if call.key == (layer.module, layer.call)), None)
    if producer is None or layer.side == "in" or kind_of(trace.modules[producer.path]) == "norm":
        return False  # a normalization follows
    if network is None:
        return layer.layout == "vector"  # the output has no channels, as for one class
    reached = {producer.output}
    for call in trace.calls:
        if call.path and kind_of(trace.modules[call.path]) in KINDS_AFTER_LOGITS and reached & set(call.inputs):
            reached.add(call.output)
    if reached & set(network.results):
        return True
    # If functions computed the output, it belongs to this layer if it has the same number of channels.
    returned_by_modules = {tensor for call in trace.calls if call.path for tensor in call.results}
    axis = -1 if layer.layout in ("maps_last", "tokens", "windows") else 1
    return not (returned_by_modules & set(network.results)) and network.shape[axis] == layer.channels


def _tour(model: Model, layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """Return `count` layers from stem to logits: the first and the last, and one layer of blocks evenly between them.

    Of each block it is a layer whose channels are units: see `_layer_with_units`.
    """
    weighted = _convs(model, layers, config)
    if len(weighted) < 2:
        return list(layers)
    first, last = weighted[0], weighted[-1]
    blocks = [layer for layer in _blocks(model, layers, config) if first.cost < layer.cost < last.cost]
    with_units = [_layer_with_units(layers, block) for block in blocks]
    # Without a rectifier in any block, its output is as good as any other layer of it.
    middle = list(dict.fromkeys(layer for layer in with_units if layer is not None)) or blocks
    if len(middle) < min(config.count - 2, 3):  # a network without blocks, such as VGG
        middle = [layer for layer in weighted[1:-1] if layer.rectified] or weighted[1:-1]
    count = min(max(config.count - 2, 0), len(middle))
    selected = [middle[(2 * i + 1) * len(middle) // (2 * count)] for i in range(count)]
    return [layer for layer in layers if layer in (first, *selected, last)]


def _layer_with_units(layers: Sequence[Layer], block: Layer) -> Layer | None:
    """Return the layer of a block whose channels are units, or None if no rectifier reads or made a layer of it.

    A non-linearity that acts on each channel alone makes channels special: next to it, another basis of the same space
    would be another network. The linear output of a block has no such basis: any rotation of its channels, undone in
    the next convolution, gives the same network (Elhage et al. 2023, "Privileged Bases in the Transformer Residual
    Stream").

    It is the output of the block if a rectifier made it, as in ResNet and Inception. Otherwise it is the widest
    convolution or linear layer inside that is next to a rectifier, and the last of equally wide ones: the expansion of
    an inverted residual block, the hidden layer of an MLP. Layers of a single position are left out where the block has
    a map: they are the squeezed ones of squeeze-and-excite. A depthwise convolution is taken only if there is nothing
    else. Its unit reads one channel, and the mean of its map is, up to the border, the sum of its kernel times the mean
    of that channel: if the sum is negative, what raises the mean is whatever silences the channel, and with ReLU6
    before it both have a bound that any image of the right texture reaches.
    """
    if block.rectified:
        return block
    inside = [
        layer
        for layer in layers
        if layer.kind in ("conv", "linear")
        and layer.rectified
        and layer.name.startswith(f"{block.module}.")
        and (layer.height * layer.width > 1 or block.height * block.width == 1)
    ]
    return max(reversed(inside), key=lambda layer: (not layer.depthwise, layer.channels), default=None)


def _residual(model: Model, layers: Sequence[Layer], config: LayersConfig) -> list[Layer]:
    """Return the linear outputs of blocks: those that no rectifier made or reads, such as a residual stream.

    Raises:
        AtlasError: If there are none.
    """
    linear = [layer for layer in _blocks(model, layers, config) if not layer.rectified]
    if not linear:
        raise AtlasError(
            f"{model.name} has no block with a linear output: a rectifier follows each. "
            "Use layers=blocks or layers=tour."
        )
    return linear


# Selections by the name that `layers.policy` has for them.
POLICIES = {
    "tour": _tour,
    "convs": _convs,
    "blocks": _blocks,
    "residual": _residual,
    "logits": _logits,
    "all": _all,
}
