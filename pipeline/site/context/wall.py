"""The units that the home page begins with, chosen by a rule that stands on the page."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pipeline.core import metric_specs
from pipeline.site.context.layer_summary import LayerSummary
from pipeline.site.context.unit_text import unit_link
from pipeline.store import Atlas, LayerView

WALL_UNITS = 16
WALL_LAYERS = 20
# Share of values near black or white above which an image says little.
MAX_SATURATION = 0.5
# Sides of the images in pixels, for screens of usual and of double density.
WALL_PX = (128, 256)


@dataclasses.dataclass(frozen=True)
class WallUnit:
    """A unit on the wall.

    Attributes:
        layer: Number of its layer in the atlas.
        row: Its row in the layer.
        name: The unit, as layer:channel.
        href: Address of its page, from the root of the site.
        files: Addresses of its image from the root of the site: for screens of usual density, and for double density
            if the image is large enough.
    """

    layer: int
    row: int
    name: str
    href: str
    files: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Wall:
    """Units for the home page, in the order of the network, and the rule that chose them, as text."""

    units: tuple[WallUnit, ...] = ()
    rule: str = ""


def choose(atlas: Atlas, layers: Sequence[LayerSummary], suffix: str) -> Wall:
    """Return the units of the wall; no image is read.

    The layers take turns, each with its unit of the highest score that is left, until there are `WALL_UNITS`.

    Args:
        atlas: The atlas.
        layers: Its layers.
        suffix: Suffix of the images.
    """
    rendered = [facts for facts in layers if facts.rendered]
    if len(rendered) > WALL_LAYERS:
        places = np.linspace(0, len(rendered) - 1, WALL_LAYERS).round().astype(int)
        rendered = [rendered[place] for place in places]
    compared = False
    queues: list[list[tuple[int, int]]] = []
    for facts in rendered:
        values, compares = scores(atlas[facts.name].with_cache(), facts.rendered[0].key)
        compared |= compares
        best_first = np.argsort(-values, kind="stable")
        queues.append([(facts.order, int(row)) for row in best_first if np.isfinite(values[row])])
    count = max(WALL_UNITS, len(rendered))
    turns = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    units = tuple(_unit(layers[order], row, suffix) for order, row in sorted(turns[:count]))
    return Wall(units, _rule(compared, len(rendered) < sum(bool(facts.rendered) for facts in layers)))


def scores(layer: LayerView, preset: str) -> tuple[np.ndarray, bool]:
    """Return how well the first visualization of each unit represents it, (C',), and whether transfer is known.

    A score is the robust share, limited to 0 … 1, times the quantile of the transfer among the layer's units, which is
    left out where transfer is not known. It is NaN for units without a visualization, with a failed one, and for images
    of which more than `MAX_SATURATION` is near black or white.
    """
    numbers = layer.measurements(preset, ("status", "robust", "activation", "transfer", "saturation"))
    first = {name: values[:, 0] for name, values in numbers.items()}
    result = np.ones(len(first["status"]))
    if "robust" in first:
        negative = metric_specs.is_minimized(str(layer.render_attributes(preset).get("natural", "")))
        share = metric_specs.share(first["robust"], first["activation"], negative)
        result = np.nan_to_num(share.astype(np.float64)).clip(0, 1)
    transfer = first.get("transfer", np.full(len(result), np.nan))
    known = np.isfinite(transfer)
    if known.any():
        below = (transfer[None, :] < transfer[:, None]) & known
        result = result * np.where(known, (below.sum(1) + 1) / known.sum(), 0.0)
    result[np.isin(first["status"].astype(str), ("failed", "missing"))] = np.nan
    if "saturation" in first:
        result[first["saturation"] > MAX_SATURATION] = np.nan
    return result, bool(known.any())


def _unit(facts: LayerSummary, row: int, suffix: str) -> WallUnit:
    channel = facts.channels[row]
    is_small = min(facts.rendered[0].width, facts.rendered[0].height) <= WALL_PX[0]
    files = tuple(f"wall/{facts.slug}-{channel}{density}.{suffix}" for density in ("", "-2x")[: 1 if is_small else 2])
    return WallUnit(facts.order, row, f"{facts.name}:{channel}", unit_link(facts.name, channel), files)


def _rule(compared: bool, some_layers: bool) -> str:
    which = f"Of {WALL_LAYERS} layers at equal distances" if some_layers else "Of each layer"
    product = "robust share × quantile of transfer within the layer" if compared else "robust share"
    return (
        f"{which}, the units with the highest {product}, the layers in turn until there are {WALL_UNITS}; without "
        f"failed visualizations and those with more than {MAX_SATURATION:.0%} of their values near black or white."
    )
