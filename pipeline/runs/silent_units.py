"""Units that stayed silent from noise: one more start, from their best dataset example.

It comes last, when all visualizations and the dataset pass are finished and in atlas.h5: a result does not depend on
the order of work. The results are shards of their own, which come before those of the first attempts.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.engine.tasks import RenderTask
from pipeline.planning.cost_model import PlanRow
from pipeline.planning.plan import Plan
from pipeline.runs.artifacts import Artifacts
from pipeline.runs.best_examples import best_example_image
from pipeline.store import hdf5, shards
from pipeline.store.reader import Atlas
from pipeline.store.shards import Shard
from pipeline.visualization.evaluation import SILENT
from pipeline.visualization.initial_images import NO_EXAMPLE, InitialImage

# Channels that share a shard, with that shard.
_Part = tuple[Shard, tuple[int, ...]]


def silent_units(plan: Plan, artifacts: Artifacts) -> dict[PlanRow, list[int]]:
    """Return the silent channels of each row that were not restarted; empty before the dataset pass is complete."""
    if not artifacts.dataset_pass.complete or plan.config.examples.store != "images":
        return {}
    silent = {row: artifacts.silent(row) for row in plan.rows if plan.config.preset(row.preset).can_restart}
    return {row: channels for row, channels in silent.items() if channels}


def restart_tasks(plan: Plan, artifacts: Artifacts, atlas: Atlas) -> list[RenderTask]:
    """Return the tasks that restart all silent units, and write the shards of those without a dataset example.

    Args:
        plan: The plan.
        artifacts: Finished results in the run folder.
        atlas: The atlas of these results, with the dataset pass.
    """
    tasks = []
    for row, channels in silent_units(plan, artifacts).items():
        examples = {channel: best_example_image(atlas, row.layer.name, channel) for channel in channels}
        preset = plan.config.preset(row.preset)
        batch = plan.config.channels_per_batch(preset, row.layer.channels, plan.setup.device)
        for shard, own in _by_shard(artifacts, row, channels):
            _write_without_example(artifacts, row, shard, [channel for channel in own if examples[channel] is None])
            found = {channel: image for channel in own if (image := examples[channel]) is not None}
            for start in range(0, len(found), batch):
                part = dict(list(found.items())[start : start + batch])
                tasks.append(_task(artifacts, row, shard, part))
    return tasks


def _by_shard(artifacts: Artifacts, row: PlanRow, channels: Sequence[int]) -> list[_Part]:
    """Return the shards that provide the visualizations of `channels`."""
    parts = []
    left = set(channels)
    for shard in artifacts.visualizations[row]:
        own = tuple(sorted(artifacts.channels_in(shard) & left))
        left -= set(own)
        if own:
            parts.append((shard, own))
    return parts


def _rows_of(shard: Shard, channels: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the arrays of some channels of a shard, in their order. Raises `DamagedShardError`."""
    with shard.opened() as opened:
        names = [n for n in hdf5.member_names(opened) if n not in ("channels", "images_sha256", "judges")]
    numbers = shard.get("channels")["channels"].tolist()
    rows = [numbers.index(channel) for channel in channels]
    arrays = {name: array[rows] for name, array in shard.get(*names).items()}
    return arrays | {"channels": np.array(channels, np.int32)}


def _path(artifacts: Artifacts, row: PlanRow, channels: Sequence[int]) -> Path:
    folder = artifacts.folder.shards / "render" / shards.safe_name(row.layer.name)
    return folder / f"{channels[0]}-{channels[-1]}-{len(channels)}-{artifacts.restart_digest(row)[:12]}.h5"


def _task(artifacts: Artifacts, row: PlanRow, shard: Shard, examples: dict[int, InitialImage]) -> RenderTask:
    channels = tuple(examples)
    return RenderTask(
        str(_path(artifacts, row, channels)),
        str(shard.attributes["digest"]),
        row.cost(len(channels)),
        row.layer.name,
        channels,
        row.canvas,
        row.preset,
        starts=tuple(examples.values()),
        restart=artifacts.restart_digest(row),
        silent=shards.to_bytes({}, _rows_of(shard, channels)),
    )


def _write_without_example(artifacts: Artifacts, row: PlanRow, shard: Shard, channels: Sequence[int]) -> None:
    """Write a shard of units that cannot be restarted: as they were, with both reasons."""
    if not channels:
        return
    arrays = _rows_of(shard, channels)
    silent = (arrays["status"] == "failed") & (arrays["reason"] == SILENT)
    arrays["reason"] = np.where(silent, f"{SILENT}; {NO_EXAMPLE}", arrays["reason"])
    attributes = {
        key: value for key, value in shard.attributes.items() if key not in ("order", *shards.FILE_ATTRIBUTES)
    }
    attributes["restart"] = artifacts.restart_digest(row)
    shards.write(_path(artifacts, row, channels), attributes, arrays)
