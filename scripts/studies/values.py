"""The values of a study: one row for each image of each run, from the atlases alone."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pandas as pd
from plan import Plan

from pipeline.store.reader import Atlas, open_atlas

HERE = Path(__file__).resolve().parent
# Runs by network and condition.
Runs = Mapping[tuple[str, str], Path]


def own_code(name: str) -> ModuleType | None:
    """Return the module study_measures/NAME.py of a study that needs more than the columns of `Atlas.units`; else None.

    It may have `values(run, frame)`, which returns the frame of a run with more columns or other rows; `draw(runs,
    table)`, which returns the figure; and `tables(runs, table)`, which returns further tables by caption.
    """
    if not (HERE / "study_measures" / f"{name}.py").is_file():
        return None
    return importlib.import_module(f"study_measures.{name}")


def table_of(name: str, plan: Plan, runs: Runs) -> tuple[pd.DataFrame, int, float]:
    """Return the values of a study, the number of units that were excluded, and the minutes of the optimization.

    A unit is excluded from all arms of its network if it is silent on the whole dataset, or if any image failed: what
    remains is the same set of units in every arm.

    Args:
        name: Name of the study.
        plan: Its plan.
        runs: Its runs.

    Returns:
        One row for each image with the columns network, condition, arm, layer, channel, variant, depth (position of the
        layer in its network) and those of `Atlas.units`; the number; the sum of the times of all images.
    """
    module = own_code(name)
    frames, seconds = [], 0.0
    for (network, condition), run in runs.items():
        with open_atlas(run) as atlas:
            frame = atlas.units() if plan.arms else statistics_of(atlas)
            depth = {layer: i for i, layer in enumerate(atlas.layers)}
        seconds += float(frame["seconds"].sum()) if "seconds" in frame else 0.0
        if module is not None and hasattr(module, "values"):
            frame = module.values(run, frame)
        frame = frame.assign(network=network, condition=condition, depth=frame["layer"].map(depth))
        frame["arm"] = [plan.arm_name(condition, str(preset)) for preset in frame["preset"]]
        frames.append(frame)
    table = pd.concat(frames, ignore_index=True)
    return *_without_excluded(table), seconds / 60


def statistics_of(atlas: Atlas) -> pd.DataFrame:
    """Return one row for each unit of an atlas without visualizations: statistics, facets and rotation number."""
    parts = []
    for layer in atlas:
        columns = {**layer.stats(), **layer.facet_numbers()}
        numbers = {name: values for name, values in columns.items() if values.ndim == 1}
        parts.append(
            pd.DataFrame(
                {"layer": layer.name, "channel": layer.channels, "preset": "", "variant": 0, **numbers}
            ).assign(rotation=layer.rotation_number)
        )
    return pd.concat(parts, ignore_index=True)


def _without_excluded(table: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    unit = ["network", "layer", "channel"]
    bad = pd.Series(False, table.index)
    if "status" in table:
        bad |= table["status"] == "failed"
    if "inactive" in table:
        bad |= table["inactive"].fillna(False).astype(bool)
    excluded = table.loc[bad, unit].drop_duplicates()
    keys = pd.MultiIndex.from_frame(table[unit])
    kept = ~keys.isin(pd.MultiIndex.from_frame(excluded))
    return table[kept].reset_index(drop=True), len(excluded)
