"""Measure receptive field, stride and offset of layers by probing the network with NaN.

**Method.** If some rows of the input are NaN, exactly those units become NaN whose receptive field contains one of the
rows. NaN passes through convolution, normalization, activation, pooling, addition, concatenation and attention alike,
so the result is exact for any network, including functional operations. Rows and columns are measured separately. The
example shows a layer with size 7, stride 4 and offset -1::

    input row              0         5         10        15        20
    block of NaN           . . . . . . . . # # # # . . . . . . . . . .     shift 0: rows 8 to 11
    unit 1, rows  3 to 9         [===========]                             first unit that is NaN
    unit 2, rows  7 to 13                [===========]
    unit 3, rows 11 to 17                        [===========]             last unit that is NaN
    unit 4, rows 15 to 21                                [===========]

The block is moved down row by row. Unit 1 is NaN up to shift 1, so its receptive field ends at row 8 + 1 = 9. Unit 4
becomes NaN at shift 4, so its receptive field begins at row 11 + 4 = 15. By a shift of one stride, the first and the
last NaN unit both move by one; a layer of which this is not true is not uniform (windows of attention, adaptive
pooling) and is measured more slowly: rows of NaN are added from the top and then from the bottom of the image until
each unit is NaN, and the smallest receptive field that contains those of all units is reported (`_enveloped`).

**What makes it fast.**

* Both shifts of the rows of NaN are found by bisection within one stride, for all layers and both ends in the same
  forward passes (`_SlidingBlock`). Where another layer or the other axis suggests a position, only its two sides are
  tested.
* Probes are as narrow as the network accepts, down to 32 pixels (`_narrowest`).
* Probes start at the length of the network's own input, and grow up to `MAX_LENGTH` for the layers of which a NaN unit
  lies at the border (`_along`): a receptive field can be larger than the input.
* Layers of which all units depend on the first pixel, at any size, see the whole image and are not measured (`_local`).
* One axis is enough if all kernels and the input are square (`_isotropic`).
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.core.errors import AtlasError, first_line
from pipeline.layers.finding import Layer, ReceptiveField, capture
from pipeline.models.loading import Model

log = logging.getLogger(__name__)

# Upper bounds on memory: length of a probe in pixels, and pixels in one batch of probes.
MAX_LENGTH = 4096
BATCH_PIXELS = 16 * 224 * 224

Interval = tuple[int, int]


class _AxisField(NamedTuple):
    """Receptive field along one axis, in pixels; see `ReceptiveField`."""

    size: int
    stride: int
    offset: int


@dataclasses.dataclass(frozen=True)
class _Probe:
    """Shape of the images that are used to measure one axis.

    Attributes:
        axis: 0 for rows, 1 for columns.
        length: Pixels along the axis.
        width: Pixels across the axis.
    """

    axis: int
    length: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.length, self.width) if self.axis == 0 else (self.width, self.length)


def receptive_fields(model: Model, layers: Sequence[Layer]) -> dict[str, ReceptiveField | None]:
    """Measure the receptive fields of layers.

    If receptive fields differ from unit to unit (windows of attention), the result is the smallest one that contains
    those of all units. If the network accepts one input size only, a receptive field that reaches from one side of the
    image to the other is reported as the whole image.

    Args:
        model: The network, on the CPU: GPU kernels may spread NaN over a tile.
        layers: The layers.

    Returns:
        Receptive fields by layer name; None if a unit sees the whole image, or if the layer is not spatial.
    """
    layers = [layer.source for layer in layers]
    fields: dict[str, ReceptiveField | None] = dict.fromkeys((layer.name for layer in layers), None)
    spatial = [layer for layer in layers if layer.spatial]
    local = _local(model, spatial) if spatial else []
    if not local:
        return fields
    vertical = _along(model, local, 0, {})
    horizontal = vertical if _isotropic(model) else _along(model, local, 1, vertical)
    for layer in local:
        rows, columns = vertical.get(layer.name), horizontal.get(layer.name)
        if rows is not None and columns is not None:
            fields[layer.name] = ReceptiveField(
                (rows.size, columns.size), (rows.stride, columns.stride), (rows.offset, columns.offset)
            )
    return fields


def _isotropic(model: Model) -> bool:
    """Return whether the input and all kernels are square, so that rows and columns have the same receptive field."""
    for module in model.module.modules():
        if hasattr(module, "type_name"):
            return False  # modules of an exported program do not have the attributes of their kernels
        for key in ("kernel_size", "stride", "padding", "dilation", "output_size"):
            value = getattr(module, key, None)
            if isinstance(value, tuple) and len(set(value)) > 1:
                return False
    return model.preprocessing.size[0] == model.preprocessing.size[1]


def _local(model: Model, layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers that have a unit which does not see the first pixel, at some size that the network accepts."""
    pending = list(layers)
    local: set[str] = set()
    height, width = model.preprocessing.size
    for factor in (1, 4):
        length = min(height * factor, max(MAX_LENGTH, height))
        for probe in (_Probe(0, length, width), _Probe(0, length, width * factor)):
            if not pending or (factor > 1 and probe.width > width and local):
                break
            units = _nan_units(model, pending, probe, [(0, 1)])
            if units is None:
                continue
            local |= {layer.name for layer in pending if not units[layer.name][0].all()}
            pending = [layer for layer in pending if layer.name not in local]
            break
    return [layer for layer in layers if layer.name in local]


def _along(
    model: Model, layers: Sequence[Layer], axis: int, guesses: Mapping[str, _AxisField | None]
) -> dict[str, _AxisField | None]:
    """Measure the receptive fields along one axis.

    Args:
        model: The network.
        layers: The layers.
        axis: 0 for rows, 1 for columns.
        guesses: Likely results by layer name. Good ones save time; the result does not depend on them.

    Returns:
        Receptive fields by layer name; None if a unit sees the whole axis.
    """
    side, other_side = model.preprocessing.size[axis], model.preprocessing.size[1 - axis]
    width, counts = _narrowest(model, layers, axis)
    strides, growing = _strides(model, layers, axis, width, counts)
    fields: dict[str, _AxisField | None] = {}
    pending = [layer for layer in layers if growing is None or layer.name in growing]
    irregular = [layer for layer in layers if layer not in pending]  # of one size for all images (adaptive pooling)
    length = side
    while pending and length <= max(MAX_LENGTH, side):
        # Layers of the same stride often differ by whole strides at both ends, for which any of them is a good guess.
        measured = [field for field in fields.values() if field is not None]
        fallback = measured[-1] if measured else None
        likely = {layer.name: guesses.get(layer.name) or fallback for layer in pending}
        uniform, fitting = _uniform(model, pending, _Probe(axis, length, width), strides, likely)
        fields.update(uniform)
        irregular += [layer for layer in pending if layer.name in fitting - set(uniform)]
        pending = [layer for layer in pending if layer.name not in fitting]
        if growing is None:
            break
        # The image grows by a multiple of the longest stride: some networks pad depending on the remainder of the size.
        longest = max(strides.values())
        length += longest * max(1, round(length / longest))
    if pending or irregular:
        fields.update(_enveloped(model, [*pending, *irregular], _Probe(axis, side, other_side), strides))
    return fields


def _narrowest(model: Model, layers: Sequence[Layer], axis: int) -> tuple[int, dict[str, int]]:
    """Return the smallest width across `axis` that the network accepts, and the number of units by layer along it."""
    side, other_side = model.preprocessing.size[axis], model.preprocessing.size[1 - axis]
    for width in sorted({width for width in range(32, 129, 16) if width < other_side} | {other_side}):
        counts = _num_units(model, layers, _Probe(axis, side, width))
        if counts:
            return width, counts
    return other_side, {}


def _strides(
    model: Model, layers: Sequence[Layer], axis: int, width: int, counts: Mapping[str, int]
) -> tuple[dict[str, int], set[str] | None]:
    """Return the strides by layer, and the names of the layers that have more units for a longer image.

    The second value is None if the network accepts no image of four times the length.
    """
    side = model.preprocessing.size[axis]
    strides = {
        layer.name: max(1, round(side / counts.get(layer.name, (layer.height, layer.width)[axis]))) for layer in layers
    }
    longer = 4 * side
    longer_counts = _num_units(model, layers, _Probe(axis, longer, width)) if longer <= max(MAX_LENGTH, side) else {}
    if not longer_counts:
        return strides, None
    # Without padding a map has fewer units than side / stride; the number that it gains with the length is exact.
    growing = {name for name, count in longer_counts.items() if count > counts[name]}
    for name in growing:
        strides[name] = max(1, round((longer - side) / (longer_counts[name] - counts[name])))
    return strides, growing


def _num_units(model: Model, layers: Sequence[Layer], probe: _Probe) -> dict[str, int]:
    """Return the number of units along the axis by layer; empty if the network rejects the probe."""
    units = _nan_units(model, layers, probe, [(0, 1)])
    return {} if units is None else {name: rows.shape[1] for name, rows in units.items()}


def _uniform(
    model: Model,
    layers: Sequence[Layer],
    probe: _Probe,
    strides: Mapping[str, int],
    guesses: Mapping[str, _AxisField | None],
) -> tuple[dict[str, _AxisField], set[str]]:
    """Measure the layers whose units all have the same receptive field, with a block of NaN in the middle of the probe.

    Returns:
        Receptive fields of the uniform layers by name, and the names of all layers whose receptive field fits into the
        probe.
    """
    block = _SlidingBlock(model, layers, probe, strides)
    if block.start < block.length:
        return {}, set()
    block.move({0, block.length}, layers)
    fitting = [layer for layer in layers if layer.name in block.fitting]
    shifts = {shift for layer in fitting for shift in block.whole_strides(layer.name)} - {0, block.length}
    if shifts:
        block.move(shifts, fitting)
    uniform = [layer for layer in fitting if block.moves_uniformly(layer.name)]
    block.find_ends(uniform, guesses)
    return {layer.name: block.field(layer.name) for layer in uniform if layer.name in block.fitting}, block.fitting


class _SlidingBlock:
    """A block of NaN that is moved down the middle of a probe, and the units that were NaN at each shift.

    Attributes:
        length: Rows of the block: the longest stride of the layers.
        start: First row of the block at shift 0.
        fitting: Names of the layers of which no NaN unit was the first or last one of the map so far.
    """

    def __init__(self, model: Model, layers: Sequence[Layer], probe: _Probe, strides: Mapping[str, int]) -> None:
        self._model, self._probe, self._strides = model, probe, strides
        self.length = max(strides[layer.name] for layer in layers)
        self.start = probe.length // 2 - self.length
        self.fitting = {layer.name for layer in layers}
        # First and last NaN unit, by layer and shift.
        self._units: dict[str, dict[int, Interval]] = {layer.name: {} for layer in layers}
        # Tested shifts before and after the first (0) or last (1) NaN unit of a layer changes.
        self._brackets: dict[tuple[str, int], Interval] = {}

    def move(self, shifts: Iterable[int], layers: Sequence[Layer]) -> None:
        """Record the first and the last NaN unit of `layers` for blocks at `shifts`, and update `fitting`."""
        shifts = sorted(shifts)
        blocks = [(self.start + shift, self.start + shift + self.length) for shift in shifts]
        units = _nan_units(self._model, layers, self._probe, blocks)
        if units is None:
            self.fitting.clear()
            return
        for name, is_nan in units.items():
            if not _is_inside(is_nan):
                self.fitting.discard(name)
            first = is_nan.int().argmax(1).tolist()
            last = (is_nan.shape[1] - 1 - is_nan.flip(1).int().argmax(1)).tolist()
            for index, shift in enumerate(shifts):
                self._units[name][shift] = first[index], last[index]

    def whole_strides(self, name: str) -> list[int]:
        """Return the shifts by up to three whole strides of a layer that are at most the length of the block."""
        return [k * self._strides[name] for k in range(4) if k * self._strides[name] <= self.length]

    def moves_uniformly(self, name: str) -> bool:
        """Return whether a layer fits and its first and last NaN unit move by one for each whole stride."""
        if name not in self.fitting:
            return False
        first, last = self._units[name][0]
        return all(
            self._units[name][shift] == (first + k, last + k) for k, shift in enumerate(self.whole_strides(name))
        )

    def find_ends(self, layers: Sequence[Layer], guesses: Mapping[str, _AxisField | None]) -> None:
        """Bisect the shifts at which the first (0) and the last (1) NaN unit of each layer change."""
        self._brackets = {(layer.name, end): self._bracket(layer.name, end) for layer in layers for end in (0, 1)}
        while self.fitting:
            wide = {key: bracket for key, bracket in self._brackets.items() if bracket[1] - bracket[0] > 1}
            if not wide:
                return
            shifts: set[int] = set()
            for (name, end), bracket in wide.items():
                shifts |= self._next_shifts(bracket, end, guesses.get(name))
            names = {name for name, _ in wide}
            self.move(shifts, [layer for layer in layers if layer.name in names])
            self._brackets.update({key: self._bracket(*key) for key in wide})

    def field(self, name: str) -> _AxisField:
        """Return the receptive field of a layer; `find_ends` must have been called."""
        stride = self._strides[name]
        last_seen = self._brackets[name, 0][0]  # the first row of the block is the last one that the first unit sees
        first_seen = self._brackets[name, 1][1]  # the last row of the block is the first one that a new unit sees
        end = self.start + last_seen - stride * self._units[name][last_seen][0]
        begin = self.start + first_seen + self.length - 1 - stride * self._units[name][first_seen][1]
        return _AxisField(end - begin + 1, stride, begin)

    def _bracket(self, name: str, end: int) -> Interval:
        """Return the closest tested shifts, within one stride, on both sides of the change of one end."""
        units, stride = self._units[name], self._strides[name]
        before = max(shift for shift in units if shift < stride and units[shift][end] == units[0][end])
        after = min(shift for shift in units if before < shift <= stride)
        return before, after

    def _next_shifts(self, bracket: Interval, end: int, guess: _AxisField | None) -> set[int]:
        """Return shifts to test inside a bracket: both sides of the change that a guess predicts, or the middle.

        Receptive fields of the same stride often differ from the guess by whole strides, so that the prediction counts
        modulo the stride of the guess.
        """
        if guess is not None and guess.stride:
            predicted = guess.offset - self.start + (1 - self.length if end else guess.size)
            changes = [s for s in range(bracket[0] + 1, bracket[1] + 1) if (s - predicted) % guess.stride == 0]
            if len(changes) == 1:
                return {changes[0] - 1, changes[0]} - {*bracket}
        return {sum(bracket) // 2}


def _is_inside(is_nan: Tensor) -> bool:
    """Return whether every block, a row of (blocks, units), has NaN units, but neither the first nor the last unit."""
    if is_nan.shape[1] <= 2:
        return False
    at_border = is_nan[:, 0].any() or is_nan[:, -1].any()
    return bool(is_nan.any(1).all()) and not bool(at_border)


def _enveloped(
    model: Model, layers: Sequence[Layer], probe: _Probe, strides: Mapping[str, int]
) -> dict[str, _AxisField | None]:
    """Measure the smallest receptive field that contains those of all units, at the network's own size.

    The result is None for a layer with a unit that sees both the first and the last row: it sees the whole image.
    """
    fields: dict[str, _AxisField | None] = {}
    for width in sorted({min(64, probe.width), probe.width}):
        narrow = _Probe(probe.axis, probe.length, width)
        starts = _foremost(model, layers, narrow, strides, mirrored=False)
        ends = _foremost(model, layers, narrow, strides, mirrored=True) if starts else {}
        if not ends:
            continue
        for layer in layers:
            name, stride = layer.name, strides[layer.name]
            begin, sees_first = starts[name]
            mirrored_end, sees_last = ends[name]
            fields[name] = None
            if begin is not None and mirrored_end is not None and not (sees_first & sees_last.flip(0)).any():
                end = probe.length - 1 - stride * (len(sees_first) - 1) - mirrored_end
                fields[name] = _AxisField(end - begin + 1, stride, begin)
        break
    return fields


def _foremost(
    model: Model, layers: Sequence[Layer], probe: _Probe, strides: Mapping[str, int], mirrored: bool
) -> dict[str, tuple[int | None, Tensor]]:
    """Measure where the receptive fields of layers begin, by making more and more rows NaN from the top.

    Args:
        model: The network.
        layers: The layers.
        probe: The images.
        strides: Strides by layer name.
        mirrored: Whether to start from the bottom; rows and units are then counted from there.

    Returns:
        For each layer the smallest offset over its units (first row of the receptive field minus stride × unit), and
        which units see the first row. The offset is None if all units see the first row, because the border of the
        image hides where their receptive fields begin. Empty if the network rejects the probe.
    """
    is_nan: dict[str, dict[int, Tensor]] = {layer.name: {} for layer in layers}  # by number of NaN rows
    num_rows = {*range(1, probe.length, max(strides[layer.name] for layer in layers)), probe.length}
    result: dict[str, tuple[int | None, Tensor]] = {}
    while num_rows:
        order = sorted(num_rows)
        blocks = [(probe.length - count, probe.length) if mirrored else (0, count) for count in order]
        units = _nan_units(model, layers, probe, blocks)
        if units is None:
            return {}
        num_rows = set()
        for name, rows in units.items():
            is_nan[name].update(zip(order, rows.flip(1) if mirrored else rows, strict=True))
            brackets = _brackets(is_nan[name])
            offset = {unit: strides[name] * unit for unit in brackets}
            foremost = min((high - 1 - offset[unit] for unit, (_, high) in brackets.items()), default=None)
            result[name] = foremost, is_nan[name][1]
            # A receptive field begins at row `low` or later, before `high`. Only those are refined that could still be
            # the foremost.
            num_rows |= {
                (low + high) // 2
                for unit, (low, high) in brackets.items()
                if high - low > 1 and foremost is not None and low - offset[unit] < foremost
            }
    return result


def _brackets(is_nan: Mapping[int, Tensor]) -> dict[int, Interval]:
    """Return for each unit the most NaN rows at which it is not NaN, and the fewest at which it is.

    Units that see the first row are left out.
    """
    order = sorted(is_nan)
    table = torch.stack([is_nan[num_rows] for num_rows in order]).int()
    first = table.argmax(0).tolist()
    return {unit: (order[i - 1], order[i]) for unit, i in enumerate(first) if i > 0}


def _nan_units(
    model: Model, layers: Sequence[Layer], probe: _Probe, blocks: Sequence[Interval]
) -> dict[str, Tensor] | None:
    """Return which units along the axis become NaN, for blocks of NaN from row `start` up to, not including, `end`.

    Returns:
        Bool tensors (blocks, units) by layer name: whether any channel is NaN, anywhere across the axis. None if the
        network rejects the probe.
    """
    parts: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

    def append(layer: Layer, maps: Tensor) -> None:
        parts[layer.name].append(maps.isnan().any(1).any(2 - probe.axis))

    batch = max(1, BATCH_PIXELS // (probe.length * probe.width))
    try:
        with capture(model, layers, each=append) as forward, torch.no_grad():
            for first in range(0, len(blocks), batch):
                chunk = blocks[first : first + batch]
                images = torch.full((len(chunk), model.preprocessing.channels, *probe.size), 0.5)
                for image, (start, end) in zip(images, chunk, strict=True):
                    image.narrow(probe.axis + 1, start, end - start).fill_(torch.nan)
                forward(images)
        return {name: torch.cat(tensors) for name, tensors in parts.items()}
    except (AtlasError, RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
        # Networks reject sizes with errors of many types.
        log.debug("a probe of %s pixels is rejected: %s", probe.size, first_line(error))
        return None
