"""Which units a rerun is about: those of a table, or those whose pictures in a former run were not good enough."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.config.unit_filter import UnitFilter
from pipeline.core import metric_specs
from pipeline.core.config_files import decoded
from pipeline.core.errors import AtlasError, first_line, nearest
from pipeline.layers.finding import Layer
from pipeline.store.layer_view import LayerView
from pipeline.store.reader import Atlas, open_atlas

Units = dict[str, tuple[int, ...]]


def selected(
    table: str | None, only: str | None, base: Path | None, preset: str, layers: Sequence[Layer]
) -> Units | None:
    """Channels by layer name, in the order of `layers`, that a table and a condition leave; None without either.

    `base` is the run whose pictures by `preset` (its main one, if it has none by that name) the condition is about.
    Raises `AtlasError` for what can't be read, names no unit of the network, or leaves none.
    """
    if table is None and only is None:
        return None
    listed = None if table is None else known(read(Path(table).expanduser()), layers, f"units={table}")
    if only is None:
        assert listed is not None
        return listed
    if base is None:
        raise AtlasError(f"only={only} needs base=runs/NAME: the run whose pictures it judges.")
    with open_atlas(base) as atlas:
        judged = known(judge(atlas, UnitFilter.of(only), preset), layers, f"only={only}")
    if listed is None:
        return judged
    both = {name: tuple(sorted(set(listed[name]) & set(judged.get(name, ())))) for name in listed}
    if not any(both.values()):
        raise AtlasError(f"None of the units of {table} is so that only={only} holds of it in {base}.")
    return {name: channels for name, channels in both.items() if channels}


def read(path: Path) -> list[tuple[str, int]]:
    """(layer, channel) of each row of a table: a CSV or a Parquet file.

    Its columns `layer` and `channel` count, whatever else there is, as in what `atlas export` writes. A CSV without
    such a header has two columns, or one of `layer:channel`.
    """
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path, columns=["layer", "channel"])
            rows = [("layer", "channel"), *zip(frame["layer"].astype(str), frame["channel"].astype(str), strict=True)]
        else:
            text = decoded(path.read_bytes(), f"units={path}")
            rows = [tuple(cell.strip() for cell in row) for row in csv.reader(io.StringIO(text, "")) if any(row)]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise AtlasError(f"units={path} can't be read: {reason}") from None
    if not rows:
        raise AtlasError(f"units={path} is empty: rows of layer,channel, or of layer:channel, are needed.")
    if {"layer", "channel"} <= set(rows[0]):
        places = [rows[0].index("layer"), rows[0].index("channel")]
        pairs = [(row[places[0]], row[places[1]]) if len(row) > max(places) else ("", "") for row in rows[1:]]
    elif len(rows[0]) == 1:
        # A header of one word is none of `layer:channel`.
        named = [row[0] for row in rows if row is not rows[0] or ":" in row[0]]
        pairs = [(layer, channel) for layer, _, channel in (name.rpartition(":") for name in named)]
    else:
        pairs = [(row[0], row[1]) for row in rows if len(row) > 1]
    return [(layer, _number(channel, path, number)) for number, (layer, channel) in enumerate(pairs, 1)]


def _number(text: str, path: Path, row: int) -> int:
    try:
        number = float(text)
        if number >= 0 and number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise AtlasError(
        f"units={path}: {text!r} in row {row} is no channel. Rows are layer,channel (as `atlas export --csv` writes "
        "them) or layer:channel."
    )


def known(units: Iterable[tuple[str, int]], layers: Sequence[Layer], where: str) -> Units:
    """The same units by layer, in the order of the network; `AtlasError` that begins with `where` for one unknown."""
    names = {layer.alias: layer for layer in layers if layer.alias} | {layer.name: layer for layer in layers}
    found: dict[str, set[int]] = {}
    for name, channel in units:
        if name not in names:
            raise AtlasError(f"{where}: the network has no layer {name!r}. {nearest(name, names)}")
        layer = names[name]
        if channel >= layer.channels:
            raise AtlasError(
                f"{where}: {layer.name} has {layer.channels} channels, 0 … {layer.channels - 1}, and no {channel}."
            )
        found.setdefault(layer.name, set()).add(channel)
    if not found:
        raise AtlasError(f"{where} names no unit at all.")
    return {layer.name: tuple(sorted(found[layer.name])) for layer in layers if layer.name in found}


def judge(atlas: Atlas, only: UnitFilter, preset: str) -> list[tuple[str, int]]:
    """Units of an atlas that the condition holds of, by their pictures of `preset`, or of the main one without such.

    Raises `AtlasError`, with what there is, where it holds of none.
    """
    found: list[tuple[str, int]] = []
    seen: Counter[str] = Counter()
    ratios: list[np.ndarray] = []
    for layer in atlas:
        if not layer.presets:
            continue
        own = preset if preset in layer.presets else layer.presets[0]
        status = layer.numbers(own)["status"]
        seen.update(map(str, status.ravel()))
        if only.below is None:
            rows = (status == only.status).any(1)
        else:
            reached = best_ratio(layer, own)
            ratios.append(reached[~np.isnan(reached)])
            rows = reached < only.below
        found += [(layer.name, int(channel)) for channel in layer.channels[rows]]
    if found:
        return found
    if only.below is None:
        counts = ", ".join(f"{status} {count}" for status, count in seen.most_common())
        raise AtlasError(f"only={only.status}: no picture of {atlas.path} is that. There are: {counts or 'none'}.")
    there = np.concatenate([np.zeros(0), *ratios])
    if not len(there):
        raise AtlasError(f"only=below:{only.below}: {atlas.path} has no examples to hold its pictures against.")
    raise AtlasError(f"only=below:{only.below}: the least achieved ÷ natural in {atlas.path} is {there.min():.3g}.")


def best_ratio(layer: LayerView, preset: str) -> np.ndarray:
    """Achieved ÷ natural of the best picture of each unit, (C',) float32; −inf where no activation is finite.

    NaN where photographs say nothing: none drove the unit the way that the pictures do. Of negatives both are below
    zero.
    """
    activation = layer.numbers(preset)["activation"]
    negative = layer.render_attributes(preset).get("natural") in ("least", "min")
    reached = np.where(np.isfinite(activation), activation, np.inf if negative else -np.inf)
    return metric_specs.gain(reached, layer.natural(preset), negative).max(1)
