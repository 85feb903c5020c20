"""Where the channel axis of a module's output is, found by running the network on two input sizes.

What grows with the picture is space, what grows with the batch is the batch, and what stays is the channel.
Where a network takes one size only, the kind of module and the shape decide.
"""

import dataclasses
import logging
import math
from collections.abc import Container, Iterator, Sequence
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
Part = Literal["patches", "all", "prefix"]

# Class, distillation and register tokens together are never more than this.
MOST_PREFIX = 32


@dataclasses.dataclass(frozen=True)
class Axes:
    """A layout, and for tokens how many at the start are no patches and the (height, width) of the patches."""

    layout: Layout
    prefix: int = 0
    grid: tuple[int, int] | None = None


def as_maps(
    output: Tensor, axes: Axes, batch: int | None = None, part: Part = "patches", size: tuple[float, float] = (1, 1)
) -> Tensor:
    """Any layer output of `batch` images as (B, C, H, W), so that *channel c* means the same thing everywhere.

    | layout | shape | becomes |
    |---|---|---|
    | maps | (B, C, H, W) | itself |
    | maps_last | (B, H, W, C) | the map |
    | tokens | (B, N, C) | the map of patches, or 1 × N of all tokens, or 1 × prefix of class and like tokens |
    | tokens_first | (N, B, C) | the same |
    | flat | (B, C, N) | the same |
    | windows | (B · windows, …, C) | windows × positions in a window |
    | vector | (B, C) | 1 × 1 |

    `size` is (height, width) of the images relative to those that the grid was found on.
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
    if part == "prefix":
        return tokens[:, :, : axes.prefix].unsqueeze(2)
    patches = tokens[:, :, axes.prefix :]
    high, wide = axes.grid or (1, patches.shape[2])
    height = max(1, round(high * size[0]))
    if height * max(1, round(wide * size[1])) != patches.shape[2]:
        return patches.unsqueeze(2)
    return patches.unflatten(2, (height, -1))


def find_axes(model: Model) -> tuple[Trace, dict[tuple[str, int], Axes]]:
    """A trace at the network's own size, and the axes of every call with a channel axis, by `Call.key`.

    Left out are outputs that are not per image (tables of positions), that have no channel axis (attention
    weights), and, with the reason in the log, those that depend on the other images of the batch or on chance.
    """
    try:
        trace = trace_of(model)
    except NotTaken as error:
        raise error.explained() from error
    other = next(_other(model), None)
    small = other or trace
    random_state = torch.get_rng_state()
    try:
        two = Trace(model, small.size, half=small)
    except AtlasError as error:
        raise AtlasError(
            f"{model.name} takes one image at a time: {str(error).splitlines()[0]}\nVisualizations are made in "
            "batches. An exported program needs a batch of any size: torch.export.export(..., "
            "dynamic_shapes=({0: Dim('batch')},))."
        ) from error
    seconds = {call.key: call for call in small.calls} if other else {}
    batches = {call.key: call for call in two.calls}
    found: dict[tuple[str, int], Axes] = {}
    layouts: dict[int, Layout] = {}
    for call in trace.calls:
        double = batches.get(call.key)
        batch = double.batch if double else 0
        if batch is None:
            continue
        layout = _layout(trace, call, seconds.get(call.key), small.size, batch, layouts)
        if layout is not None:
            layouts[call.output] = layout
            found[call.key] = Axes(layout)
    _drop_chosen_regions(model, trace, found)
    _refuse_not_finite(model, trace, found)
    if not torch.equal(random_state, torch.get_rng_state()):
        _refuse_coupled(model, _repeated(model, small), found)
    _refuse_coupled(model, two.calls, found)
    return trace, {key: _grid(axes, key, trace, found, seconds) for key, axes in found.items()}


def _drop_chosen_regions(model: Model, trace: Trace, found: dict[tuple[str, int], Axes]) -> None:
    """Leave out what is computed for regions that a detector chooses: their number depends on the image.

    Several outputs an image are windows only if an image of one colour has as many of them.
    """
    if all(axes.layout != "windows" for axes in found.values()):
        return
    grey = {call.key: call.shape for call in Trace(model, grey=True).calls}
    chosen = [call for call in trace.calls if call.key in found and found[call.key].layout == "windows"]
    chosen = [call for call in chosen if grey.get(call.key) != call.shape]
    for call in chosen:
        del found[call.key]
    if chosen:
        log.info("%d layers of regions that depend on the image are left out, as %s", len(chosen), chosen[0].name)


def _refuse_not_finite(model: Model, trace: Trace, layers: Container[tuple[str, int]]) -> None:
    """Raise `AtlasError` where a layer's output holds infinity or NaN for an image of noise, naming the first one."""
    wrong = next((call for call in trace.calls if not call.finite and call.key in layers), None)
    if wrong is not None:
        raise AtlasError(
            f"{model.name} gives infinity or NaN for an image of noise, first in {wrong.name!r}, a "
            f"{type(trace.modules[wrong.path]).__name__}. Nothing can be optimised through that: check the weights, "
            "and the input's range (model.mean, model.std, model.value_range)."
        )


def _repeated(model: Model, trace: Trace) -> list[Call]:
    """The calls of a trace, each marked by whether its output is the same when the same image is run again.

    This is done for networks that draw random numbers: what a dropout changes may vanish in a mean over a large map.
    """
    again = {call.key: call.sample for call in Trace(model, trace.size).calls}
    return [dataclasses.replace(call, same=_equal(call.sample, again.get(call.key))) for call in trace.calls]


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is None or other is None or torch.allclose(one, other, rtol=1e-5, atol=1e-6 * float(one.abs().max()))


def _refuse_coupled(model: Model, calls: Sequence[Call], layers: Container[tuple[str, int]]) -> None:
    """Raise `AtlasError` where an image's output depends on chance or on the other image of a batch of two."""
    wrong = next((i for i, call in enumerate(calls) if not call.same and call.key in layers), None)
    if wrong is None:
        return
    call = calls[wrong]
    # The cause may lie between modules, as a dropout called as a function does: behind the last output that agrees.
    before = next((c for c in reversed(calls[:wrong]) if c.same and c.key in layers), None)
    inside = before is not None and before.output in call.inputs
    place = f"in {call.name!r}" if inside or before is None else f"between {before.name!r} and {call.name!r}"
    raise AtlasError(
        f"{model.name} gives one image another output in a batch of two, or at every pass, and this begins {place}: "
        "a dropout that is always on (training=True), noise, or a normalization by the batch's own statistics "
        "(track_running_stats=False). Visualizations of such a network would be wrong: switch it off in the builder."
    )


def checked(axes: Axes, layout: str, call: Call, where: str) -> Axes:
    """`axes` with the layout that the configuration says, if the output has the number of axes for it."""
    if layout not in LAYOUTS:
        raise AtlasError(f"layers.layouts: {layout!r} for {where} is not one of {', '.join(LAYOUTS)}.")
    dims = {"maps": (4,), "maps_last": (4,), "vector": (2,), "windows": (2, 3, 4)}.get(layout, (3,))
    if len(call.shape) not in dims:
        shape = " × ".join(map(str, call.shape))
        raise AtlasError(f"layers.layouts: {where} gives {shape}, which can't be {layout!r}.")
    return dataclasses.replace(axes, layout=layout)  # type: ignore[arg-type]


def _other(model: Model) -> Iterator[Trace]:
    """Traces at other input sizes that the network takes, small ones first: they are cheap."""
    height, width = model.recipe.size
    steps = [32 * round(min(height, width) * 0.7 / 32) - min(height, width), 32, min(height, width)]
    for step in steps:
        if min(height, width) + step < 32 or step == 0 or (step < 0 and min(height, width) < 96):
            continue
        try:
            trace = Trace(model, (height + step, width + step))
        except AtlasError:
            continue
        yield trace


def _layout(
    trace: Trace, call: Call, second: Call | None, size: tuple[int, int], batch: int, known: dict[int, Layout]
) -> Layout | None:
    """The layout of one call, or None where it has no channel axis."""
    shape: tuple[int, ...] = call.shape
    module = trace.modules[call.path]
    if len(shape) not in (2, 3, 4) or 0 in shape:
        return None
    if batch == 0 and call.shape[0] > 1:
        # Windows become more with the image; a fixed number of them are regions that a detector has chosen.
        fixed = second is not None and second.shape[0] == shape[0]
        return "windows" if kind_of(module) != "conv" and not fixed else None
    if batch != 0:
        return "tokens_first" if len(shape) == 3 and batch == 1 else None
    if len(shape) == 2:
        return "vector"
    grown: tuple[int, ...] = ()
    if second is not None and len(second.shape) == len(shape):
        grown = tuple(i for i in range(1, len(shape)) if shape[i] != second.shape[i])
    said = _said(module, shape)
    if len(shape) == 3:
        if grown == (1, 2):
            return None  # weights of attention, summed over its heads
        if grown == (2,) and said != "last":
            return "flat"
        # A linear layer over positions (a mixer's) has its own outputs for channels.
        return "flat" if not grown and said == "second" else "tokens"
    height, wide, last = (shape[i] for i in (1, 2, 3))
    if grown == (2, 3) and second is not None:
        # Attention weights grow with the area, maps with the side.
        side, area = size[0] / trace.size[0], size[0] * size[1] / (trace.size[0] * trace.size[1])
        growth = second.shape[2] / wide
        square = wide == last > 4
        return None if square and abs(growth - area) < abs(growth - side) / 2 else "maps"
    if grown == (1, 2) or (grown == (1,) and wide == 1):
        return "maps_last"
    if grown == (3,) or (grown == (2,) and last == 1):
        return "maps"
    if grown:
        return None
    if said is not None:
        return "maps" if said == "second" else "maps_last"
    if height == wide != last:
        return "maps_last"
    if wide == last != height:
        return "maps"
    before: list[Layout] = [known[i] for i in call.inputs if known.get(i) in ("maps", "maps_last")]
    return before[0] if before else "maps"


def _said(module: torch.nn.Module, shape: tuple[int, ...]) -> Literal["second", "last"] | None:
    """Where a module of a known kind says that its channels are."""
    kind = kind_of(module)
    if kind == "conv":
        return "second"
    if kind == "linear":
        return "last"
    if class_of(module) is torch.nn.LayerNorm:
        return "last"
    features = getattr(module, "num_features", None) or getattr(module, "num_channels", None)
    if kind == "norm" and features == shape[1] != shape[-1]:
        return "second"
    return None


def _grid(
    axes: Axes,
    key: tuple[str, int],
    trace: Trace,
    found: dict[tuple[str, int], Axes],
    seconds: dict[tuple[str, int], Call],
) -> Axes:
    """Tokens with the map that their patches form: that of the last maps before them that they can be of.

    What is left over at the start are class, distillation and register tokens; where a second size was run,
    there must be as many of them there.
    """
    axis = {"tokens": 1, "tokens_first": 0, "flat": 2}.get(axes.layout)
    if axis is None:
        return axes
    place = next(i for i, call in enumerate(trace.calls) if call.key == key)
    count = trace.calls[place].shape[axis]
    sources = [call for call in trace.calls[:place] if call.key in found and found[call.key].layout[:4] == "maps"]
    for call in reversed(sources[-1:]):
        (high, wide), prefix = _sides(call, found[call.key]), 0
        prefix = count - high * wide
        if high * wide > 1 and 0 <= prefix <= MOST_PREFIX:
            if key in seconds and call.key in seconds:
                high2, wide2 = _sides(seconds[call.key], found[call.key])
                if seconds[key].shape[axis] - high2 * wide2 != prefix:
                    continue
            return Axes(axes.layout, prefix, (high, wide))
    # Without a map before them, as square as the picture is.
    high = math.isqrt(max(1, count * trace.size[0] // trace.size[1]))
    wide = count // high
    if (
        high * wide > 1
        and count - high * wide <= MOST_PREFIX
        and abs(high / wide - trace.size[0] / trace.size[1]) < 0.2
    ):
        return Axes(axes.layout, count - high * wide, (high, wide))
    return axes


def _sides(call: Call, axes: Axes) -> tuple[int, int]:
    return (call.shape[2], call.shape[3]) if axes.layout == "maps" else (call.shape[1], call.shape[2])
