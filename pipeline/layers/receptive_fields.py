"""Receptive field, stride and offset of layers, found by probing with NaN.

Set some rows of the input to NaN: exactly those units become NaN that see one of them. NaN passes through
convolution, normalisation, activation, pooling, addition, concatenation and attention alike, so the answer is
exact for any network, functional operations included. A block of NaN slid over one stride of a layer finds the
row where the field of one of its units begins and the row where another's ends; that is all there is to know.

The probes are long and narrow where the network takes such pictures, and grow until a field fits: a field may
be larger than the network's own input. A layer whose units all see the block, however long the probe, sees the
whole image.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import torch

from pipeline.core.errors import AtlasError, first_line
from pipeline.layers.finding import Layer, ReceptiveField, capture
from pipeline.models.loading import Model

log = logging.getLogger(__name__)

# No probe is longer (pixels), and no batch of probes larger (pixels in all): a bound on memory.
LONGEST = 4096
BATCH_PIXELS = 16 * 224 * 224

Edge = tuple[int, int]
Axis = tuple[int, int, int]


def receptive_fields(model: Model, layers: Sequence[Layer]) -> dict[str, ReceptiveField | None]:
    """Receptive field of each layer by name; None where a unit sees the whole image (or no map is left).

    Runs on the model's device, which must be the CPU: GPU kernels may smear NaN over a tile. Where fields
    differ from unit to unit (windows of attention), the field is the smallest that holds every unit's. For a
    network that takes one size only, a field that reaches over the picture from one side to the other is
    reported as the whole image.
    """
    found: dict[str, ReceptiveField | None] = dict.fromkeys((layer.name for layer in layers), None)
    spatial = [layer for layer in layers if layer.spatial]
    local = _local(model, spatial) if spatial else []
    if not local:
        return found
    down = _along(model, local, 0, {})
    across = down if _isotropic(model) else _along(model, local, 1, down)
    for layer in local:
        rows, columns = down.get(layer.name), across.get(layer.name)
        if rows is not None and columns is not None:
            found[layer.name] = ReceptiveField((rows[0], columns[0]), (rows[1], columns[1]), (rows[2], columns[2]))
    return found


def _isotropic(model: Model) -> bool:
    """Whether rows and columns are treated alike by a square input and every kernel, so that one probe serves both."""
    for module in model.module.modules():
        if hasattr(module, "type_name"):
            return False  # an exported program keeps its kernels to itself
        for key in ("kernel_size", "stride", "padding", "dilation", "output_size"):
            value = getattr(module, key, None)
            if isinstance(value, tuple) and len(set(value)) > 1:
                return False
    return model.recipe.size[0] == model.recipe.size[1]


@dataclasses.dataclass(frozen=True)
class _Probe:
    """The shape of a probe along one axis: `length` pixels along it, `width` across."""

    axis: int
    length: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return (self.length, self.width) if self.axis == 0 else (self.width, self.length)


def _local(model: Model, layers: Sequence[Layer]) -> list[Layer]:
    """Layers of which some unit does not see the first pixel, at some size of picture that the network takes."""
    left = list(layers)
    local: set[str] = set()
    height, width = model.recipe.size
    for factor in (1, 4):
        long = min(height * factor, max(LONGEST, height))
        for probe in (_Probe(0, long, width), _Probe(0, long, width * factor)):
            if not left or (factor > 1 and probe.width > width and local):
                break
            touched = _touched(model, left, probe, [(0, 1)])
            if touched is None:
                continue
            local |= {la.name for la in left if len(units := touched[la.name]) and not units[0].all()}
            left = [la for la in left if la.name not in local]
            break
    return [layer for layer in layers if layer.name in local]


def _along(
    model: Model, layers: Sequence[Layer], axis: int, guesses: Mapping[str, Axis | None]
) -> dict[str, Axis | None]:
    """(size, stride, offset) along one axis of each layer by name; None for the whole image.

    Good `guesses` save time; the answer is the same with any.
    """
    own, other = model.recipe.size[axis], model.recipe.size[1 - axis]
    narrow, counts = _narrowest(model, layers, axis, own, other)
    strides = {la.name: max(1, round(own / counts.get(la.name, (la.height, la.width)[axis]))) for la in layers}
    # A map that loses its margin is shorter than the stride says; what it gains with the picture is exact.
    longer = 4 * own
    more = _counts(model, layers, _Probe(axis, longer, narrow)) if longer <= max(LONGEST, own) else {}
    for name, units in more.items():
        if units > counts[name]:
            strides[name] = max(1, round((longer - own) / (units - counts[name])))
    grows = {name for name, units in more.items() if units > counts[name]}
    found: dict[str, Axis | None] = {}
    left = [la for la in layers if la.name in grows or not more]
    rest = [la for la in layers if la not in left]  # of one size for every picture (adaptive pools)
    length = own
    while left and length <= max(LONGEST, own):
        # Layers of one stride often differ by whole strides on both sides, which guesses need not know.
        near = [f for f in found.values() if f is not None][-1:]
        likely = {la.name: guesses.get(la.name) or (near[0] if near else None) for la in left}
        alike, fit = _uniform(model, left, _Probe(axis, length, narrow), strides, likely)
        found.update(alike)
        rest += [la for la in left if la.name in fit - set(alike)]
        left = [la for la in left if la.name not in fit]
        if not more:
            break
        # Of lengths that leave the same remainders: some networks pad by what is left.
        most = max(strides.values())
        length += most * max(1, round(length / most))
    if left or rest:
        found.update(_enveloped(model, [*left, *rest], _Probe(axis, own, other), strides))
    return found


def _narrowest(model: Model, layers: Sequence[Layer], axis: int, own: int, other: int) -> tuple[int, dict[str, int]]:
    """The least width across the axis that the network takes, and how many units each layer has along it."""
    for width in sorted({w for w in range(32, 129, 16) if w < other} | {other}):
        counts = _counts(model, layers, _Probe(axis, own, width))
        if counts:
            return width, counts
    return other, {}


def _counts(model: Model, layers: Sequence[Layer], probe: _Probe) -> dict[str, int]:
    """Units along the axis by layer; none where the network does not take the probe."""
    touched = _touched(model, layers, probe, [(0, 1)])
    return {} if touched is None else {name: units.shape[1] for name, units in touched.items()}


def _uniform(
    model: Model,
    layers: Sequence[Layer],
    probe: _Probe,
    strides: dict[str, int],
    guesses: Mapping[str, Axis | None],
) -> tuple[dict[str, Axis], set[str]]:
    """Size, stride and offset of layers whose fields are alike from unit to unit, and all names whose fields fit.

    A block as long as the longest stride is slid from the middle on. By one stride on, one more unit sees its end
    and one less its beginning; where between, is found by halving, unless it is where `guesses` say.
    """
    block = max(strides[la.name] for la in layers)
    middle = probe.length // 2 - block
    seen: dict[str, dict[int, Edge]] = {la.name: {} for la in layers}
    fit = {la.name for la in layers}

    def slide(shifts: set[int], who: Sequence[Layer]) -> None:
        """Note the first and the last unit that see the block shifted so far; drop layers that it does not fit."""
        order = sorted(shifts)
        touched = _touched(model, who, probe, [(middle + i, middle + i + block) for i in order])
        for name, units in (touched or {}).items():
            fit.difference_update(() if _inside(units) else (name,))
            first = units.int().argmax(1).tolist()
            last = (units.shape[1] - 1 - units.flip(1).int().argmax(1)).tolist()
            seen[name].update(zip(order, zip(first, last, strict=True), strict=True))
        if touched is None:
            fit.clear()

    if middle < block:
        return {}, set()
    slide({0, block}, layers)
    left = [la for la in layers if la.name in fit]
    steps = {la.name: [k * strides[la.name] for k in range(4) if k * strides[la.name] <= block] for la in left}
    asked = {i for shifts in steps.values() for i in shifts} - {0, block}
    if asked:
        slide(asked, left)

    def alike(name: str) -> bool:
        zero = seen[name][0]
        return name in fit and all(
            seen[name][i] == (zero[0] + k, zero[1] + k) for k, i in enumerate(steps[name])
        )  # fmt: skip

    left = [la for la in left if alike(la.name)]
    brackets = {(la.name, edge): _bracket(seen[la.name], edge, strides[la.name]) for la in left for edge in (0, 1)}
    while open_ := {key: (i, j) for key, (i, j) in brackets.items() if j - i > 1}:
        asked = set()
        for (name, edge), bracket in open_.items():
            size, period, begin = guesses.get(name) or (0, 0, 0)
            asked |= _between(bracket, begin - middle + (1 - block if edge else size), period)
        names = {name for name, _ in open_}
        slide(asked, [la for la in left if la.name in names])
        brackets.update({key: _bracket(seen[key[0]], key[1], strides[key[0]]) for key in open_})
    found = {}
    for name, stride in ((la.name, strides[la.name]) for la in left if la.name in fit):
        out, into = brackets[name, 0][0], brackets[name, 1][1]
        # Shifted by `into`, the block's last row is the first that this unit sees; by `out`, its first the last.
        begin = middle + into + block - 1 - stride * seen[name][into][1]
        end = middle + out - stride * seen[name][out][0]
        found[name] = (end - begin + 1, stride, begin)
    return found, fit


def _between(bracket: Edge, likely: int, period: int) -> set[int]:
    """Where to look for a change: on both sides of the one place that is likely, or in the middle."""
    places = [i for i in range(bracket[0] + 1, bracket[1] + 1) if period and (i - likely) % period == 0]
    return {places[0] - 1, places[0]} - {*bracket} if len(places) == 1 else {sum(bracket) // 2}


def _bracket(seen: dict[int, Edge], edge: int, stride: int) -> tuple[int, int]:
    """The nearest shifts known, within one stride, before and after the first (0) or last (1) unit changes."""
    before = max(i for i in seen if i < stride and seen[i][edge] == seen[0][edge])
    after = min(i for i in seen if before < i <= stride)
    return before, after


def _inside(units: torch.Tensor) -> bool:
    """Whether blocks were seen, and never by the first or the last unit."""
    return bool(units.shape[1] > 2 and units.any(1).all() and not units[:, 0].any() and not units[:, -1].any())


def _enveloped(model: Model, layers: Sequence[Layer], probe: _Probe, strides: dict[str, int]) -> dict[str, Axis | None]:
    """Size, stride and offset of the smallest field that holds every unit's, at the network's own size.

    Rows are added to the NaN from the top, then from the bottom. A layer one of whose units sees both the first
    and the last row sees the whole image.
    """
    found: dict[str, Axis | None] = {}
    for width in sorted({min(64, probe.width), probe.width}):
        narrow = _Probe(probe.axis, probe.length, width)
        tops = _edges(model, layers, narrow, strides, mirrored=False)
        bottoms = _edges(model, layers, narrow, strides, mirrored=True) if tops else {}
        for layer in layers if bottoms else ():
            name, stride = layer.name, strides[layer.name]
            (begin, top), (mirrored, bottom) = tops[name], bottoms[name]
            found[name] = None
            if begin is not None and mirrored is not None and not (top & bottom.flip(0)).any():
                end = probe.length - 1 - stride * (len(top) - 1) - mirrored
                found[name] = (end - begin + 1, stride, begin)
        if bottoms:
            break
    return found


def _edges(
    model: Model, layers: Sequence[Layer], probe: _Probe, strides: dict[str, int], mirrored: bool
) -> dict[str, tuple[int | None, torch.Tensor]]:
    """For each layer where the foremost field would begin for unit 0, and which units see the first row.

    None where every unit does: what the picture's edge cuts off says nothing. Mirrored, rows and units count from
    the far end. Nothing at all where the network does not take the probe.
    """
    known: dict[str, dict[int, torch.Tensor]] = {layer.name: {} for layer in layers}
    wanted = {*range(1, probe.length, max(strides[la.name] for la in layers)), probe.length}
    result: dict[str, tuple[int | None, torch.Tensor]] = {}
    while wanted:
        order = sorted(wanted)
        blocks = [(probe.length - x, probe.length) if mirrored else (0, x) for x in order]
        touched = _touched(model, layers, probe, blocks)
        if touched is None:
            return {}
        wanted = set()
        for name, units in touched.items():
            known[name].update(zip(order, units.flip(1) if mirrored else units, strict=True))
            brackets = _brackets(known[name])
            shift = {unit: strides[name] * unit for unit in brackets}
            foremost = min((hi - 1 - shift[u] for u, (_, hi) in brackets.items()), default=None)
            result[name] = foremost, known[name][1]
            # A field begins at lo or later, and before hi: look on only where one could still be the foremost.
            wanted |= {
                (lo + hi) // 2
                for u, (lo, hi) in brackets.items()
                if hi - lo > 1 and foremost is not None and lo - shift[u] < foremost
            }
    return result


def _brackets(known: dict[int, torch.Tensor]) -> dict[int, tuple[int, int]]:
    """For each unit that does not see the first row: the most rows it was not touched by, and the fewest it was."""
    order = sorted(known)
    table = torch.stack([known[x] for x in order]).int()
    first = table.argmax(0).tolist()
    return {u: (order[i - 1], order[i]) for u, i in enumerate(first) if i > 0}


def _touched(
    model: Model, layers: Sequence[Layer], probe: _Probe, blocks: Sequence[Edge]
) -> dict[str, torch.Tensor] | None:
    """For each layer (blocks, units along the axis): which units see one of the rows start … end - 1 of a block.

    None where the network does not take the probe.
    """
    seen: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}

    def note(layer: Layer, maps: torch.Tensor) -> None:
        # NaN of any channel counts, anywhere across the axis.
        seen[layer.name].append(maps.isnan().any(1).any(2 - probe.axis))

    batch = max(1, BATCH_PIXELS // (probe.length * probe.width))
    try:
        with capture(model, layers, each=note) as forward, torch.no_grad():
            for start in range(0, len(blocks), batch):
                chunk = blocks[start : start + batch]
                images = torch.full((len(chunk), model.recipe.channels, *probe.size), 0.5)
                for image, (begin, end) in zip(images, chunk, strict=True):
                    image.narrow(probe.axis + 1, begin, end - begin).fill_(torch.nan)
                forward(images)
        return {name: torch.cat(parts) for name, parts in seen.items()}
    except (AtlasError, RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
        # Networks refuse sizes in as many ways as there are networks.
        log.debug("a probe of %s pixels is not taken: %s", probe.size, first_line(error))
        return None
