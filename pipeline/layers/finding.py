"""Enumerate the layers of a network, and capture their activations.

A *layer* is one output of one module call. It is named by the path of the module, with "#2" for the second call of a
shared module. A convolution or linear layer is read **before the activation function and after its own
normalization**, if a normalization follows directly; any other layer is the output of its module.
"""

import collections
import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.core.errors import AtlasError, nearest_names
from pipeline.layers.layouts import Axes, Layout, Part, as_maps, find_axes, override_layout, tokens_of
from pipeline.layers.rectifiers import rectified_taps
from pipeline.layers.tracing import CONVS, Call, Trace, class_of, kind_of, modules_of, tensor_of
from pipeline.models.loading import Model

Side = Literal["in", "out"]


@dataclasses.dataclass(frozen=True)
class ReceptiveField:
    """Receptive field of the units of a layer, in input pixels.

    Unit (y, x) depends on `size[0]` rows of the image, from row `stride[0] * y + offset[0]` on; columns likewise.

    Attributes:
        size: (height, width).
        stride: Distance of the receptive fields of neighboring units, (rows, columns).
        offset: First row and column that unit (0, 0) depends on; negative inside the padding.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    offset: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a network: where its output is read, and the shape of its feature maps.

    Attributes:
        name: Module path, with "#2" for a second call.
        kind: Kind of the module; see `tracing.kind_of`.
        module: Path of the module that the hook is registered on; for a convolution it may be the normalization.
        call: Number of the call of that module, from 1.
        side: Whether the layer is the input or the output of that module.
        layout: Axes of the tensor; see `layouts.as_maps`.
        channels: Number of channels.
        height: Height of the map for an image of the network's own size.
        width: Width of the map for an image of the network's own size.
        cost: Multiply-adds of one forward pass up to this layer.
        field: Receptive field; None if a unit sees the whole image, or if it has not been computed.
        prefix: Number of tokens at the start that are not patches (class, distillation and register tokens).
        grid: (height, width) of the patches of a layer of tokens.
        part: Which tokens make up the map.
        alias: Name of the layer in the literature, if it differs.
        rectified: Whether zero is a threshold of its values, because a rectifier reads them or made them; see
            `rectifiers.rectified_taps`.
        linear_in_pixels: Whether it is a linear function of the pixels, as a first convolution; see `pixel_kernels`.
        depthwise: Whether it is a convolution that computes each channel from one channel of its input.
    """

    name: str
    kind: str
    module: str
    call: int
    side: Side
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
    rectified: bool = True
    linear_in_pixels: bool = False
    depthwise: bool = False

    @property
    def tap(self) -> list[Any]:
        """All attributes that determine the values of this layer, for digests."""
        return [self.name, self.module, self.call, self.side, self.layout, self.prefix, self.grid, self.part]

    @property
    def place(self) -> tuple[str, int, Side]:
        """Module, call and side: layers with the same place read the same tensor."""
        return self.module, self.call, self.side

    @property
    def spatial(self) -> bool:
        """Whether positions in its map correspond to positions in the image."""
        patches = self.layout in ("tokens", "tokens_first", "flat") and self.grid is not None and self.part == "patches"
        return patches or self.layout in ("maps", "maps_last")

    @property
    def of_channels(self) -> bool:
        """Whether the units are channels of the network, and not computed from them."""
        return True

    @property
    def has_effects(self) -> bool:
        """Whether effects on the outputs and connections are measured."""
        return True

    def maps(self, output: Tensor, batch: int, size: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        """Return the tensor at this layer as maps (B, C, H, W).

        Args:
            output: The tensor that the hook received.
            batch: Number of images, B.
            size: (height, width) of the images relative to the network's own input size.
        """
        return as_maps(output, Axes(self.layout, self.prefix, self.grid), batch, self.part, size)

    def slopes(self, gradient: Tensor, batch: int) -> Tensor:
        """Return the derivatives of a scalar with respect to the units of this layer, (B, C, H, W).

        Args:
            gradient: Its gradient with respect to the tensor at this layer.
            batch: Number of images, B.
        """
        return self.maps(gradient, batch)

    def set_channels(self, maps: Tensor, channels: Sequence[int], values: np.ndarray) -> None:
        """Set one unit of each image to a value at all positions, in place.

        Args:
            maps: Maps (B, C, H, W) of `source` for B copies of one image.
            channels: The unit of each copy.
            values: Its value in each copy, (B,).
        """
        for image, (channel, value) in enumerate(zip(channels, values, strict=True)):
            maps[image, channel] = float(value)

    @property
    def source(self) -> "Layer":
        """The layer that is read in the network, under the name of this one: another if units are computed from it."""
        return self

    @property
    def ungated(self) -> "Layer":
        """The layer with the same values, and gradients as if no activation function were part of it."""
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """The fields of every kind of layer by name, as plain data; without arrays that a layer may have besides."""
        return {
            field.name: dataclasses.asdict(value) if isinstance(value, ReceptiveField) else value
            for field in dataclasses.fields(Layer)
            for value in [getattr(self, field.name)]
        }


@dataclasses.dataclass(frozen=True)
class ArrayLayer(Layer):
    """A layer whose units are computed from what is read, by arrays that the layer has."""

    _held: dict[torch.device, dict[str, Tensor]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def arrays(self) -> dict[str, np.ndarray | None]:
        """The arrays by name."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields for pickling, without copies of the arrays on a device."""
        return {**self.__dict__, "_held": {}}

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        """Return the arrays on a device; they are copied to the last device once."""
        held = self._held.get(device)
        if held is None:
            self._held.clear()
            held = self._held[device] = on_device(self.arrays, device)
        return held


def on_device(arrays: Mapping[str, np.ndarray | None], device: torch.device) -> dict[str, Tensor]:
    """Return arrays as tensors on a device; those that are None are left out."""
    # Ray sends arrays as read-only memory, which PyTorch does not take.
    return {
        name: torch.from_numpy(np.require(array, requirements="W")).to(device)
        for name, array in arrays.items()
        if array is not None
    }


class _StopForward(Exception):
    """Raised in a hook to end the forward pass after the last requested layer."""


@contextlib.contextmanager
def capture(
    model: Model,
    layers: Sequence[Layer],
    each: Callable[[Layer, Tensor], Any] | None = None,
    stop: bool = True,
    optional: Sequence[Layer] = (),
) -> Iterator[Callable[[Tensor], Any]]:
    """Register hooks at layers and provide a function that returns their activations.

    The hooks are removed on exit.

    Args:
        model: The network.
        layers: The layers to read.
        each: Called as `each(layer, maps)` as soon as the output of a layer exists. The activations are then not
            kept, and the values of the returned dictionaries are None.
        stop: Whether to end the forward pass after the last of the layers.
        optional: Further layers, which are read if the network computes them before the last of `layers`.

    Yields:
        A function `forward(images)` that takes images (B, C, H, W) in [0, 1] and returns activations (B, C, H, W) by
        layer name, float32 or the lower precision of the network. It raises `AtlasError` if the network does not
        compute one of the layers for these images.
    """
    recorder = _ActivationRecorder(model, layers, each, stop, optional)
    try:
        recorder.attach()
        yield recorder.forward
    finally:
        recorder.detach()


class _ActivationRecorder:
    """Forward hooks that collect the activations of layers during `forward`; see `capture` for the arguments."""

    def __init__(
        self,
        model: Model,
        layers: Sequence[Layer],
        each: Callable[[Layer, Tensor], Any] | None,
        stop: bool,
        optional: Sequence[Layer],
    ) -> None:
        self.model, self.layers, self.each, self.stop = model, layers, each, stop
        self._required = {layer.name for layer in layers}
        self._optional = [layer for layer in optional if layer.name not in self._required]
        self._missing = len(self._required)
        self._activations: dict[str, Tensor | None] = {}
        self._num_calls: collections.Counter[tuple[str, Side]] = collections.Counter()
        self._batch = 1
        self._relative_size = (1.0, 1.0)
        self._running = False
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Register one hook for each module and side."""
        modules = modules_of(self.model.module)
        taps: dict[tuple[str, Side], dict[int, list[Layer]]] = {}
        for layer in (*self.layers, *self._optional):
            taps.setdefault((layer.module, layer.side), {}).setdefault(layer.call, []).append(layer)
        for tap, layers_by_call in taps.items():
            self._handles.append(self._register(modules[tap[0]], tap, layers_by_call))

    def detach(self) -> None:
        """Remove the hooks and release the activations."""
        for handle in self._handles:
            handle.remove()
        self._activations.clear()

    def forward(self, images: Tensor) -> dict[str, Tensor | None]:
        """Run the network on images (B, C, H, W) in [0, 1] and return the activations by layer name."""
        self._activations.clear()
        self._num_calls.clear()
        self._missing = len(self._required)
        height, width = self.model.preprocessing.size
        # Plain numbers: while a network is traced for an export, sizes are tensors.
        self._batch = int(images.shape[0])
        self._relative_size = (int(images.shape[-2]) / height, int(images.shape[-1]) / width)
        images = images.contiguous(memory_format=self.model.memory_format)
        self._running = True
        try:
            with contextlib.suppress(_StopForward):
                self.model.module(self.model.normalize(images))
        finally:
            self._running = False
        missing = [layer.name for layer in self.layers if layer.name not in self._activations]
        if missing:
            raise AtlasError(
                f"{self.model.name} did not run {', '.join(missing[:3])} for these images: what it computes depends on "
                "the image. Exclude such layers with layers.exclude."
            )
        return dict(self._activations)

    def _register(
        self, module: nn.Module, tap: tuple[str, Side], layers_by_call: Mapping[int, Sequence[Layer]]
    ) -> RemovableHandle:
        # Closures and not bound methods: `copy.deepcopy` of a module would copy this object with the latter.
        if tap[1] == "in":

            def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
                self._record(tap, (args, kwargs), layers_by_call)

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            self._record(tap, output, layers_by_call)

        return module.register_forward_hook(after)

    def _record(self, tap: tuple[str, Side], value: Any, layers_by_call: Mapping[int, Sequence[Layer]]) -> None:
        """Collect the layers of one module call from its input or output."""
        if not self._running:
            return  # another `capture` runs the same network, as in the estimate of an ensemble
        self._num_calls[tap] += 1
        tensor = tensor_of(value)
        for layer in layers_by_call.get(self._num_calls[tap], ()):
            if tensor is None and layer.name not in self._required:
                continue
            if tensor is None:
                raise AtlasError(f"{layer.name} has no tensor for these images. Exclude it with layers.exclude.")
            maps = layer.maps(tensor, self._batch, self._relative_size)
            if maps.dtype == torch.float64:
                maps = maps.float()  # objectives and statistics are computed in single precision
            self._keep(layer, maps)
        if self.stop and not self._missing:
            raise _StopForward

    def _keep(self, layer: Layer, maps: Tensor) -> None:
        if layer.name in self._required and layer.name not in self._activations:
            self._missing -= 1
        if self.each is not None:
            self._activations[layer.name] = None
            self.each(layer, maps)
            return
        self._activations[layer.name] = maps
        if not (self.stop and not self._missing):
            # The rest of the forward pass may change this tensor in place.
            self._activations[layer.name] = maps.clone()


def enumerate_layers(
    model: Model,
    layouts: Mapping[str, str] | None = None,
    part: Part = "patches",
    prefix: int | None = None,
    aliases: Mapping[str, str] | None = None,
) -> list[Layer]:
    """Return all layers of a network in the order of computation, from a few forward passes on noise.

    Args:
        model: The network.
        layouts: Layouts by glob on layer names; they override the detected ones.
        part: Which tokens make up the maps of layers of tokens.
        prefix: Number of tokens that are not patches; None to detect it.
        aliases: Module paths by the names that the literature uses.

    Raises:
        AtlasError: If the network rejects its own input, has no layer that hooks can reach, or if its output for one
            image depends on the other images of the batch.
    """
    layouts = layouts or {}
    trace, axes_by_call = find_axes(model)
    layers: list[Layer] = []
    outputs: set[int] = set()
    matched: set[str] = set()
    for call in trace.calls:
        name = call.name
        axes = axes_by_call.get(call.key)
        for pattern, layout in layouts.items():
            if fnmatch.fnmatchcase(name, pattern):
                matched.add(pattern)
                axes = override_layout(axes or Axes("maps"), layout, call, name)
        if axes is None or (not call.path and call.output in outputs):
            continue  # the output of the whole network is a layer only if no module inside returns it
        outputs.add(call.output)
        if prefix is not None and axes.layout in ("tokens", "tokens_first", "flat"):
            axes = dataclasses.replace(axes, prefix=prefix)
        layer = _layer(trace, call, axes, part, aliases or {})
        layers.append(layer)
        projection = _hidden_projection(trace, call, layer.channels)
        if projection:
            layers.append(dataclasses.replace(layer, name=name.replace(call.path, projection, 1), kind="linear"))
    for pattern in layouts:
        if pattern not in matched:
            suggestion = nearest_names(pattern, [call.path for call in trace.calls])
            raise AtlasError(f"layers.layouts: no layer matches {pattern!r}. {suggestion}")
    if not layers:
        raise AtlasError(
            f"{model.name} has no module whose output has channels, so there is no layer that a hook could read. "
            "Replace functional calls by modules (torch.nn.Conv2d, torch.nn.Linear, …)."
        )
    rectified = rectified_taps(model, {layer.place for layer in layers})
    return [
        dataclasses.replace(layer, rectified=layer.place in rectified, depthwise=_is_depthwise(model, layer))
        for layer in layers
    ]


def _is_depthwise(model: Model, layer: Layer) -> bool:
    """Return whether a layer is a convolution that computes each channel from one channel of its input."""
    if layer.kind != "conv":
        return False  # the output of a network is no module of it
    module = model.module.get_submodule(layer.name.partition("#")[0])
    return isinstance(module, CONVS) and module.groups == module.in_channels > 1


def _layer(trace: Trace, call: Call, axes: Axes, part: Part, aliases: Mapping[str, str]) -> Layer:
    """Build the layer of one call."""
    name, kind = call.name, kind_of(trace.modules[call.path])
    if tokens_of(part, axes.prefix) == 0:
        part = "patches"
    module, index, side = _tap(trace, call) if kind in ("conv", "linear") else (call.path, call.index, "out")
    maps = as_maps(torch.empty(call.shape, device="meta"), axes, 1, part)
    alias = ""
    for short, path in aliases.items():
        if name == path or name.startswith((f"{path}.", f"{path}#")):
            alias = short + name[len(path) :]
    _, channels, height, width = maps.shape
    return Layer(
        name=name,
        kind=kind,
        module=module,
        call=index,
        side=side,
        layout=axes.layout,
        channels=channels,
        height=height,
        width=width,
        cost=call.cost,
        prefix=axes.prefix,
        grid=axes.grid,
        part=part,
        alias=alias,
    )


def _tap(trace: Trace, call: Call) -> tuple[str, int, Side]:
    """Return (module, call, side) where a convolution or linear layer is read: after its own normalization, if any.

    A normalization belongs to the layer if it is the only module that reads its output. The containers of the
    normalization do not count: they receive the same tensor if the normalization is their first child.
    """
    readers = trace.readers.get(call.output, [])
    norm = next((reader for reader in readers if kind_of(trace.modules[reader.path]) == "norm"), None)
    if norm is None or norm.shape != call.shape:
        return call.path, call.index, "out"
    for reader in readers:
        path = reader.path
        if path not in ("", norm.path) and not _is_inside(norm.path, path) and not _is_inside(path, norm.path):
            return call.path, call.index, "out"
    # timm fuses normalization and activation in one module; the input of its `act` is before the activation.
    fused = f"{norm.path}.act"
    return (fused, norm.index, "in") if fused in trace.modules else (norm.path, norm.index, "out")


def _is_inside(path: str, container: str) -> bool:
    return path.startswith(f"{container}.")


def _hidden_projection(trace: Trace, call: Call, channels: int) -> str | None:
    """Return the path of the output projection of an attention module that applies it as a function, without hooks.

    The output of the projection is that of the attention module. Examples are torch's MultiheadAttention (`out_proj`)
    and torchvision's Swin (`proj`).
    """
    module = trace.modules[call.path]
    if kind_of(module) != "attention":
        return None
    for name in ("out_proj", "proj"):
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Module) and issubclass(class_of(projection), nn.Linear):
            path = f"{call.path}.{name}"
            weight = getattr(projection, "weight", None)
            is_called = any(other.path == path for other in trace.calls)
            if not is_called and isinstance(weight, Tensor) and len(weight) == channels:
                return path
    return None
