"""Selection of the units of a rerun: by a table, and by a condition on their visualizations in an earlier run."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.config.schema import Config
from pipeline.config.unit_filter import UnitFilter
from pipeline.core import metric_specs
from pipeline.core.config_files import decode_text
from pipeline.core.errors import AtlasError, first_line, nearest_names
from pipeline.core.units import Unit
from pipeline.layers.finding import Layer
from pipeline.site.context.layer_summary import Catalogue, summarize
from pipeline.site.context.wall import choose
from pipeline.store.layer_view import LayerView
from pipeline.store.reader import Atlas, open_atlas

Units = dict[str, tuple[int, ...]]


def select_units(
    table: str | None, only: str | None, base: Path | None, preset: str, layers: Sequence[Layer]
) -> Units | None:
    """Return the units that `units=` and `only=` select.

    Args:
        table: Path of the table of `units=`.
        only: Condition of `only=` on the visualizations of `base`.
        base: Folder of the base run.
        preset: Preset whose visualizations the condition is applied to; the main preset of `base` if it lacks this one.
        layers: All layers of the network.

    Returns:
        Channels by layer name, in the order of `layers`; None without a table and a condition.

    Raises:
        AtlasError: If the table can't be read or names an unknown unit, or if no unit is selected.
    """
    if table is None and only is None:
        return None
    listed = None
    if table is not None:
        listed = group_by_layer(read(Path(table).expanduser()), layers, f"units={table}")
    if only is None:
        return listed
    if base is None:
        raise AtlasError(f"only={only} needs base=runs/NAME: the run whose visualizations the condition applies to.")
    with open_atlas(base) as atlas:
        filtered = group_by_layer(filter_units(atlas, UnitFilter.of(only), preset), layers, f"only={only}")
    if listed is None:
        return filtered
    both = {name: tuple(sorted(set(listed[name]) & set(filtered.get(name, ())))) for name in listed}
    if not any(both.values()):
        raise AtlasError(f"None of the units of {table} satisfies only={only} in {base}.")
    return {name: channels for name, channels in both.items() if channels}


def read(path: Path) -> list[Unit]:
    """Read the unit of each row of a CSV or Parquet file.

    The columns `layer` and `channel` are used, as in the tables that `atlas export` writes. A CSV file without this
    header has two columns, or one of `layer:channel`.

    Raises:
        AtlasError: If the file can't be read, is empty, or holds a channel that is no number.
    """
    rows = _table_rows(path)
    if not rows:
        raise AtlasError(f"units={path} is empty: rows of layer,channel, or of layer:channel, are needed.")
    header = rows[0]
    if {"layer", "channel"} <= set(header):
        columns = [header.index("layer"), header.index("channel")]
        pairs = [(row[columns[0]], row[columns[1]]) if len(row) > max(columns) else ("", "") for row in rows[1:]]
    elif len(header) == 1:
        # A header of one word has no colon, unlike `layer:channel`.
        pairs = [Unit.split(row[0]) for row in rows if row is not header or ":" in row[0]]
    else:
        pairs = [(row[0], row[1]) for row in rows if len(row) > 1]
    return [Unit(layer, _channel(channel, path, number)) for number, (layer, channel) in enumerate(pairs, 1)]


def _table_rows(path: Path) -> list[tuple[str, ...]]:
    """Read the rows of a CSV file, or a header and the two columns of a Parquet file."""
    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path, columns=["layer", "channel"])
            pairs = zip(frame["layer"].astype(str), frame["channel"].astype(str), strict=True)
            return [("layer", "channel"), *pairs]
        text = decode_text(path.read_bytes(), f"units={path}")
        return [tuple(cell.strip() for cell in row) for row in csv.reader(io.StringIO(text, "")) if any(row)]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise AtlasError(f"units={path} can't be read: {reason}") from None


def _channel(text: str, path: Path, row: int) -> int:
    """Parse a channel; the row is only for the error message."""
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


def group_by_layer(units: Iterable[Unit], layers: Sequence[Layer], where: str) -> Units:
    """Group units by layer, in the order of the network.

    Args:
        units: The units; a layer is given by its name or its alias.
        layers: All layers of the network.
        where: Beginning of error messages, which names the source of the units.

    Raises:
        AtlasError: If a layer or channel does not exist, or if there is no unit.
    """
    names = {layer.alias: layer for layer in layers if layer.alias} | {layer.name: layer for layer in layers}
    channels: dict[str, set[int]] = {}
    for name, channel in units:
        if name not in names:
            raise AtlasError(f"{where}: the network has no layer {name!r}. {nearest_names(name, names)}")
        layer = names[name]
        if channel >= layer.channels:
            raise AtlasError(
                f"{where}: {layer.name} has {layer.channels} channels, 0 … {layer.channels - 1}, and no {channel}."
            )
        channels.setdefault(layer.name, set()).add(channel)
    if not channels:
        raise AtlasError(f"{where} names no unit.")
    return {layer.name: tuple(sorted(channels[layer.name])) for layer in layers if layer.name in channels}


def filter_units(atlas: Atlas, only: UnitFilter, preset: str) -> list[Unit]:
    """Return the units of an atlas whose visualizations satisfy a condition.

    Args:
        atlas: The atlas.
        only: The condition.
        preset: Preset of the visualizations; a layer without it uses its main preset.

    Raises:
        AtlasError: If no unit satisfies it; the message reports the values that exist.
    """
    selected: list[Unit] = []
    statuses: Counter[str] = Counter()
    ratios: list[np.ndarray] = [np.zeros(0)]
    for layer in atlas:
        if not layer.presets:
            continue
        used_preset = preset if preset in layer.presets else layer.presets[0]
        status = layer.measurements(used_preset)["status"]
        statuses.update(map(str, status.ravel()))
        if only.below is None:
            rows = (status == only.status).any(1)
        else:
            ratio = best_activation_ratio(layer, used_preset)
            ratios.append(ratio[~np.isnan(ratio)])
            rows = ratio < only.below
        selected += [Unit(layer.name, int(channel)) for channel in layer.channels[rows]]
    if selected:
        return selected
    if only.below is None:
        counts = ", ".join(f"{status} {count}" for status, count in statuses.most_common())
        raise AtlasError(
            f"only={only.status}: no visualization of {atlas.path} has this status. There are: {counts or 'none'}."
        )
    existing = np.concatenate(ratios)
    if not len(existing):
        raise AtlasError(
            f"only=below:{only.below}: {atlas.path} has no dataset examples to compare its visualizations with."
        )
    raise AtlasError(f"only=below:{only.below}: the smallest activation ratio in {atlas.path} is {existing.min():.3g}.")


def best_activation_ratio(layer: LayerView, preset: str) -> np.ndarray:
    """Return the largest activation ratio of each unit's visualizations: of peaks, in older atlases of means.

    Returns:
        (C',) float32: −inf if no activation is finite; NaN if no dataset activation has the sign that the preset
        optimizes for.
    """
    numbers = layer.measurements(preset)
    known = [numbers[name] for name in metric_specs.MAIN_METRICS if name in numbers]
    ratio = known[0] if known else np.full(numbers["activation"].shape, np.nan, np.float32)
    return np.where(np.isfinite(numbers["activation"]), ratio, -np.inf).max(1)


def display_units(config: Config, channels: Mapping[str, tuple[int, ...]]) -> Units:
    """Return the channels of each layer that get display images, as `display.units` chooses them.

    Args:
        config: The configuration of the run.
        channels: Channels of each layer that the main preset visualizes.

    Raises:
        AtlasError: If a unit is not among them, or the units of the home page are not known yet.
    """
    asked = config.display.units
    if asked == "all":
        return dict(channels)
    names = _wall_units(config.folder) if asked == "wall" else asked or ()
    units = [Unit.parse(name) for name in names]
    if asked != "wall":
        for unit in units:
            if unit.channel not in channels.get(unit.layer, ()):
                raise AtlasError(
                    f"display.units: {unit} is not among the units that this run visualizes. "
                    f"{nearest_names(unit.layer, channels)}"
                )
    return {layer: tuple(c for c in numbers if Unit(layer, c) in units) for layer, numbers in channels.items()}


def _wall_units(folder: Path) -> list[str]:
    """Return the units on the home page of the atlas in a run folder."""
    if not (folder / "atlas.h5").is_file():
        raise AtlasError(
            f"display.units=wall: {folder} has no atlas.h5 yet, whose measures choose these units. Run without it "
            "first, then `atlas run` with it: only the display images are made then."
        )
    with open_atlas(folder) as atlas:
        classes = Catalogue.of(atlas).classes
        layers = [summarize(layer, order, classes) for order, layer in enumerate(atlas)]
        return [unit.name for unit in choose(atlas, layers, "").units]
