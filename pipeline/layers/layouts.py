"""Detect the axes of every module output by running the network on two input sizes and two batch sizes.

An axis that grows with the image is a spatial axis, one that grows with the batch is the batch axis, and the one that
stays is the channel axis. If a network accepts one input size only, the type of the module and the shape decide.
`RULES` lists all cases.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from pipeline.core.errors import AtlasError
from pipeline.layers.refusals import NotTaken
from pipeline.layers.tracing import Call, Trace, class_of, kind_of, trace_of
from pipeline.models.loading import Model

log = logging.getLogger(__name__)

Layout = Literal["maps", "maps_last", "tokens", "tokens_first", "flat", "windows", "vector"]
LAYOUTS: tuple[str, ...] = get_args(Layout)
Part = Literal["patches", "all", "prefix", "class", "registers"]

CallKey = tuple[str, int]

# Upper bound of the number of class, distillation and register tokens together.
MAX_PREFIX = 32


@dataclasses.dataclass(frozen=True)
class Axes:
    """The meaning of the axes of a module output.

    Attributes:
        layout: The layout; see `as_maps`.
        prefix: For tokens, how many at the start are not patches.
        grid: For tokens, (height, width) of the patches; None if they do not form a map.
    """

    layout: Layout
    prefix: int = 0
    grid: tuple[int, int] | None = None


def as_maps(
    output: Tensor, axes: Axes, batch: int | None = None, part: Part = "patches", size: tuple[float, float] = (1, 1)
) -> Tensor:
    """Return a module output as maps (B, C, H, W), in which axis 1 is the channel for every layout.

    | layout | shape of `output` | H × W |
    |---|---|---|
    | maps | (B, C, H, W) | H × W |
    | maps_last | (B, H, W, C) | H × W |
    | tokens | (B, N, C) | `part="patches"`: the grid of patches; "all": 1 × N; others: 1 × their number |
    | tokens_first | (N, B, C) | as for tokens |
    | flat | (B, C, N) | as for tokens |
    | windows | (B · windows, …, C) | windows × positions in a window |
    | vector | (B, C) | 1 × 1 |

    Args:
        output: The module output.
        axes: Its axes.
        batch: Number of images, B; only used for windows.
        part: Which tokens make up the map.
        size: (height, width) of the images relative to those that the grid was detected with.
    """
    match axes.layout:
        case "maps":
            return output
        case "maps_last":
            return output.permute(0, 3, 1, 2)
        case "vector":
            return output[:, :, None, None]
        case "windows":
            batch = batch or 1
            return output.reshape(batch, output.shape[0] // batch, -1, output.shape[-1]).permute(0, 3, 1, 2)
        case "tokens":
            tokens = output.transpose(1, 2)
        case "tokens_first":
            tokens = output.permute(1, 2, 0)
        case "flat":
            tokens = output
    if part == "all" or (axes.grid is None and not axes.prefix):
        return tokens.unsqueeze(2)
    if part != "patches":
        first = 1 if part == "registers" else 0
        return tokens[:, :, first : first + tokens_of(part, axes.prefix)].unsqueeze(2)
    patches = tokens[:, :, axes.prefix :]
    grid_height, grid_width = axes.grid or (1, patches.shape[2])
    height = max(1, round(grid_height * size[0]))
    width = max(1, round(grid_width * size[1]))
    if height * width != patches.shape[2]:
        return patches.unsqueeze(2)
    return patches.unflatten(2, (height, -1))


def tokens_of(part: Part, prefix: int) -> int:
    """Return how many of the `prefix` tokens that are no patches are part of a map; −1 for parts with patches.

    The first of them is the class token; distillation and register tokens follow.
    """
    return {"prefix": prefix, "class": min(prefix, 1), "registers": max(prefix - 1, 0)}.get(part, -1)


def find_axes(model: Model) -> tuple[Trace, dict[CallKey, Axes]]:
    """Detect the axes of all module outputs of a network.

    Outputs are left out if they are not computed per image (tables of positions), if they have no channel axis
    (attention weights), or if they belong to regions that a detector selects.

    Returns:
        A trace at the network's own input size, and the axes of its calls by `Call.key`.

    Raises:
        AtlasError: If the network rejects its own input or a batch of two, if an output contains infinity or NaN, or
            if it depends on chance or on the other images of the batch.
    """
    try:
        trace = trace_of(model)
    except NotTaken as error:
        raise error.explained() from error
    resized = next(_resized_traces(model), None)
    single = resized or trace
    random_state = torch.get_rng_state()
    try:
        double = Trace(model, single.size, single=single)
    except AtlasError as error:
        raise AtlasError(
            f"{model.name} takes one image at a time: {str(error).splitlines()[0]}\nVisualizations are optimized in "
            "batches. An exported program needs a dynamic batch size: torch.export.export(..., "
            "dynamic_shapes=({0: Dim('batch')},))."
        ) from error
    resized_calls = {call.key: call for call in resized.calls} if resized else {}
    axes = {key: Axes(layout) for key, layout in _layouts(trace, double, resized_calls, single.size).items()}
    _drop_selected_regions(model, trace, axes)
    _require_finite(model, trace, axes)
    if not torch.equal(random_state, torch.get_rng_state()):  # the network draws random numbers
        _require_independent_images(model, _compared_with_repetition(model, single), axes)
    _require_independent_images(model, double.calls, axes)
    return trace, {key: _with_grid(key, trace, axes, resized_calls) for key in axes}


def _layouts(
    trace: Trace, double: Trace, resized_calls: Mapping[CallKey, Call], resized: tuple[int, int]
) -> dict[CallKey, Layout]:
    """Return the layouts of all calls that have a channel axis.

    Args:
        trace: One image of the network's own input size.
        double: Two images.
        resized_calls: Calls of modules in the trace of an image of another size; empty if the network accepts one size
            only.
        resized: (height, width) of that image.
    """
    growth = resized[0] / trace.size[0], resized[0] * resized[1] / (trace.size[0] * trace.size[1])
    double_calls = {call.key: call for call in double.calls}
    layouts: dict[CallKey, Layout] = {}
    layouts_by_tensor: dict[int, Layout] = {}
    for call in trace.calls:
        batch_axis = double_calls[call.key].batch if call.key in double_calls else 0
        if batch_axis is None:
            continue
        module, resized_call = trace.modules[call.path], resized_calls.get(call.key)
        layout = _layout(_Output(call, module, batch_axis, resized_call, growth, layouts_by_tensor))
        if layout is not None:
            layouts_by_tensor[call.output] = layout
            layouts[call.key] = layout
    return layouts


def _drop_selected_regions(model: Model, trace: Trace, axes: dict[CallKey, Axes]) -> None:
    """Remove outputs for regions that a detector selects: their number depends on the image.

    Outputs with several entries per image are kept if their shape is the same for an image of uniform grey.
    """
    windows = [call for call in trace.calls if call.key in axes and axes[call.key].layout == "windows"]
    if not windows:
        return
    shapes = {call.key: call.shape for call in Trace(model, grey=True).calls}
    regions = [call for call in windows if shapes.get(call.key) != call.shape]
    for call in regions:
        del axes[call.key]
    if regions:
        log.info(
            "%d layers are excluded because they process regions that depend on the image, for example %s",
            len(regions),
            regions[0].name,
        )


def _require_finite(model: Model, trace: Trace, keys: Container[CallKey]) -> None:
    """Raise `AtlasError` if an output contains infinity or NaN for an image of noise."""
    first = next((call for call in trace.calls if not call.finite and call.key in keys), None)
    if first is not None:
        raise AtlasError(
            f"{model.name} gives infinity or NaN for an image of noise, first in {first.name!r}, a "
            f"{type(trace.modules[first.path]).__name__}. Visualizations can't be optimized through it: check the "
            "weights, and the input range (model.mean, model.std, model.value_range)."
        )


def _compared_with_repetition(model: Model, trace: Trace) -> list[Call]:
    """Return the calls of a trace, with `Call.same` from a second pass on the same image.

    For networks that draw random numbers: the effect of dropout may vanish in the mean over a large map.
    """
    samples = {call.key: call.sample for call in Trace(model, trace.size).calls}
    return [dataclasses.replace(call, same=_is_equal(call.sample, samples.get(call.key))) for call in trace.calls]


def _is_equal(sample: Tensor | None, repeated: Tensor | None) -> bool:
    """Return whether two samples of an output agree; True if one is missing."""
    if sample is None or repeated is None:
        return True
    return torch.allclose(sample, repeated, rtol=1e-5, atol=1e-6 * float(sample.abs().max()))


def _require_independent_images(model: Model, calls: Sequence[Call], keys: Container[CallKey]) -> None:
    """Raise `AtlasError` if the output for an image depends on chance or on the other image of a batch of two."""
    index = next((i for i, call in enumerate(calls) if not call.same and call.key in keys), None)
    if index is None:
        return
    call = calls[index]
    # The cause may lie between two modules, such as a functional dropout: after the last output that agrees.
    previous = next((c for c in reversed(calls[:index]) if c.same and c.key in keys), None)
    if previous is None or previous.output in call.inputs:
        place = f"in {call.name!r}"
    else:
        place = f"between {previous.name!r} and {call.name!r}"
    raise AtlasError(
        f"{model.name} gives different outputs for the same image in a batch of two, or in every pass; this begins "
        f"{place}. Common causes are dropout that is always on (training=True), noise, and normalization by the "
        "statistics of the batch (track_running_stats=False). Visualizations of such a network would be wrong: switch "
        "this off in the builder."
    )


def override_layout(axes: Axes, layout: str, call: Call, name: str) -> Axes:
    """Return `axes` with a layout from the configuration.

    Args:
        axes: The detected axes.
        layout: One of `LAYOUTS`.
        call: The call of the layer.
        name: Name of the layer, for error messages.

    Raises:
        AtlasError: If the layout is unknown, or if the output has another number of axes.
    """
    if layout not in LAYOUTS:
        raise AtlasError(f"layers.layouts: {layout!r} for {name} is not one of {', '.join(LAYOUTS)}.")
    dims = {"maps": (4,), "maps_last": (4,), "vector": (2,), "windows": (2, 3, 4)}.get(layout, (3,))
    if len(call.shape) not in dims:
        shape = " × ".join(map(str, call.shape))
        raise AtlasError(f"layers.layouts: the output of {name} is {shape}, so its layout can't be {layout!r}.")
    return dataclasses.replace(axes, layout=layout)  # type: ignore[arg-type]


def _resized_traces(model: Model) -> Iterator[Trace]:
    """Yield traces at other input sizes that the network accepts, small ones first because they are cheap."""
    height, width = model.preprocessing.size
    shorter = min(height, width)
    for difference in (32 * round(shorter * 0.7 / 32) - shorter, 32, shorter):
        if shorter + difference < 32 or difference == 0 or (difference < 0 and shorter < 96):
            continue
        try:
            trace = Trace(model, (height + difference, width + difference))
        except AtlasError:
            continue
        yield trace


@dataclasses.dataclass(frozen=True)
class _Output:
    """What is observed of one module output; the conditions of `RULES` are about this.

    Attributes:
        call: The call, for one image of the network's own size.
        module: The module.
        batch_axis: The axis that grows with the batch.
        resized: The same call for an image of another size, if the network accepts one.
        growth: Factors by which the side and the area of that image differ.
        layouts_by_tensor: Layouts of the outputs of earlier calls, by tensor.
    """

    call: Call
    module: torch.nn.Module
    batch_axis: int
    resized: Call | None
    growth: tuple[float, float]
    layouts_by_tensor: Mapping[int, Layout]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.call.shape

    @property
    def dims(self) -> int:
        return len(self.shape)

    @property
    def several_per_image(self) -> bool:
        """Whether the first axis holds several entries for one image."""
        return self.batch_axis == 0 and self.shape[0] > 1

    @property
    def number_is_fixed(self) -> bool:
        """Whether the first axis has the same length for an image of another size."""
        return self.resized is not None and self.resized.shape[0] == self.shape[0]

    @property
    def grown(self) -> tuple[int, ...]:
        """The axes after the first whose length depends on the image size; empty if only one size is accepted."""
        if self.resized is None or len(self.resized.shape) != self.dims:
            return ()
        return tuple(axis for axis in range(1, self.dims) if self.shape[axis] != self.resized.shape[axis])

    @property
    def grows_with_area(self) -> bool:
        """Whether the last two axes are equal and grow with the area of the image rather than with its side."""
        _, _, rows, columns = self.shape
        if self.resized is None or rows != columns or columns <= 4:
            return False
        side, area = self.growth
        growth = self.resized.shape[2] / rows
        return abs(growth - area) < abs(growth - side) / 2

    @property
    def channel_axis(self) -> Literal["second", "last"] | None:
        """The channel axis according to the type of the module, if that determines it."""
        kind = kind_of(self.module)
        if kind == "conv":
            return "second"
        if kind == "linear" or class_of(self.module) is torch.nn.LayerNorm:
            return "last"
        features = getattr(self.module, "num_features", None) or getattr(self.module, "num_channels", None)
        if kind == "norm" and features == self.shape[1] != self.shape[-1]:
            return "second"
        return None

    @property
    def input_layout(self) -> Layout | None:
        """The layout of the first input that is a map."""
        layouts = [self.layouts_by_tensor.get(tensor) for tensor in self.call.inputs]
        return next((layout for layout in layouts if layout in ("maps", "maps_last")), None)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """The layout of outputs that meet a condition; None if they have no channel axis.

    Attributes:
        applies: The condition.
        layout: The layout.
        case: What outputs these are.
    """

    applies: Callable[[_Output], bool]
    layout: Layout | None
    case: str


# The first rule that applies determines the layout. `grown` are the axes that grow with the image.
RULES = (
    _Rule(lambda o: o.dims not in (2, 3, 4) or 0 in o.shape, None, "unknown number of axes, or empty"),
    # The first axis holds several entries per image.
    _Rule(lambda o: o.several_per_image and kind_of(o.module) == "conv", None, "convolution over parts of the image"),
    _Rule(lambda o: o.several_per_image and o.number_is_fixed, None, "regions selected by a detector"),
    _Rule(lambda o: o.several_per_image, "windows", "(B · windows, …, C): more windows for larger images"),
    # The batch is not the first axis.
    _Rule(lambda o: o.batch_axis == 1 and o.dims == 3, "tokens_first", "(N, B, C)"),
    _Rule(lambda o: o.batch_axis != 0, None, "any other batch axis"),
    # Two or three axes.
    _Rule(lambda o: o.dims == 2, "vector", "(B, C)"),
    _Rule(lambda o: o.dims == 3 and o.grown == (1, 2), None, "(B, N, N): attention weights, summed over the heads"),
    _Rule(lambda o: o.dims == 3 and o.grown == (2,) and o.channel_axis != "last", "flat", "(B, C, N): N grows"),
    # A linear layer over positions, as in an MLP-Mixer, has its own outputs as channels.
    _Rule(lambda o: o.dims == 3 and o.grown == () and o.channel_axis == "second", "flat", "(B, C, N) by module type"),
    _Rule(lambda o: o.dims == 3, "tokens", "(B, N, C)"),
    # Four axes, of which some grow.
    _Rule(lambda o: o.grown == (2, 3) and o.grows_with_area, None, "(B, heads, N, N): attention weights"),
    _Rule(lambda o: o.grown == (2, 3), "maps", "(B, C, H, W): H and W grow"),
    _Rule(lambda o: o.grown == (1, 2), "maps_last", "(B, H, W, C): H and W grow"),
    _Rule(lambda o: o.grown == (1,) and o.shape[2] == 1, "maps_last", "(B, H, 1, C)"),
    _Rule(lambda o: o.grown == (3,), "maps", "(B, C, 1, W)"),
    _Rule(lambda o: o.grown == (2,) and o.shape[3] == 1, "maps", "(B, C, H, 1)"),
    _Rule(lambda o: o.grown != (), None, "any other axes grow"),
    # Four axes, of which none grows, or a network that accepts one size only.
    _Rule(lambda o: o.channel_axis == "second", "maps", "(B, C, H, W) by module type"),
    _Rule(lambda o: o.channel_axis == "last", "maps_last", "(B, H, W, C) by module type"),
    _Rule(lambda o: o.shape[1] == o.shape[2] != o.shape[3], "maps_last", "(B, H, W, C): H = W"),
    _Rule(lambda o: o.shape[2] == o.shape[3] != o.shape[1], "maps", "(B, C, H, W): H = W"),
    _Rule(lambda o: o.input_layout == "maps_last", "maps_last", "as the input of the module"),
    _Rule(lambda o: True, "maps", "anything else"),
)


def _layout(output: _Output) -> Layout | None:
    """Return the layout of one output, or None if it has no channel axis."""
    return next(rule.layout for rule in RULES if rule.applies(output))


def _with_grid(key: CallKey, trace: Trace, axes: Mapping[CallKey, Axes], resized_calls: Mapping[CallKey, Call]) -> Axes:
    """Return the axes of one call; for tokens with the grid that their patches form and the number of prefix tokens.

    The grid is that of the last map before the tokens, if at most `MAX_PREFIX` more tokens than positions exist and, at
    another image size, equally many more. Without such a map the grid has the aspect ratio of the image.
    """
    axis = {"tokens": 1, "tokens_first": 0, "flat": 2}.get(axes[key].layout)
    if axis is None:
        return axes[key]
    index = next(i for i, call in enumerate(trace.calls) if call.key == key)
    count = trace.calls[index].shape[axis]
    grid = _grid_of_map_before(trace.calls[: index + 1], axis, axes, resized_calls) or _grid_like_image(trace, count)
    if grid is None:
        return axes[key]
    return Axes(axes[key].layout, count - grid[0] * grid[1], grid)


def _grid_of_map_before(
    calls: Sequence[Call], axis: int, axes: Mapping[CallKey, Axes], resized_calls: Mapping[CallKey, Call]
) -> tuple[int, int] | None:
    """Return the size of the last map before the last of `calls` whose positions the tokens along its `axis` can be.

    Args:
        calls: The calls up to the one whose output are tokens.
        axis: The axis of its tokens.
        axes: Detected axes of all calls.
        resized_calls: Calls for an image of another size.
    """
    *earlier, tokens = calls
    maps = [call for call in earlier if call.key in axes and axes[call.key].layout in ("maps", "maps_last")]
    # The last map may be none: queries and keys by head have four axes too.
    for source in reversed(maps):
        height, width = _map_size(source, axes[source.key])
        prefix = tokens.shape[axis] - height * width
        if height * width <= 1 or not 0 <= prefix <= MAX_PREFIX:
            continue
        if tokens.key in resized_calls and source.key in resized_calls:
            resized_height, resized_width = _map_size(resized_calls[source.key], axes[source.key])
            if resized_calls[tokens.key].shape[axis] - resized_height * resized_width != prefix:
                continue
        return height, width
    return None


def _grid_like_image(trace: Trace, count: int) -> tuple[int, int] | None:
    """Return a grid for up to `count` patches with the aspect ratio of the image, if there is one."""
    height = math.isqrt(max(1, count * trace.size[0] // trace.size[1]))
    width = count // height
    if height * width <= 1 or count - height * width > MAX_PREFIX:
        return None
    same_ratio = abs(height / width - trace.size[0] / trace.size[1]) < 0.2
    return (height, width) if same_ratio else None


def _map_size(call: Call, axes: Axes) -> tuple[int, int]:
    """Return (height, width) of an output with layout maps or maps_last."""
    return (call.shape[2], call.shape[3]) if axes.layout == "maps" else (call.shape[1], call.shape[2])
