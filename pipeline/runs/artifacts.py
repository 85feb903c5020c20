"""Results of a plan that exist in a run folder: its shards, and what atlas.h5 contains of shards that are gone."""

import logging
from pathlib import Path

import numpy as np

from pipeline.engine.tasks import render_digest
from pipeline.planning.cost_model import PlanRow
from pipeline.planning.folder import RunFolder
from pipeline.planning.plan import Plan
from pipeline.runs.dataset_pass import DatasetPass
from pipeline.store import shards, writer
from pipeline.store.shards import DamagedShardError, Shard

log = logging.getLogger(__name__)


class Artifacts:
    """Finished results of a plan.

    Small arrays are read here; images are compared with their digests when they are copied to atlas.h5, and a damaged
    one is made again then.

    Args:
        plan: The plan.
        folder: The run folder.
        previous: Artifacts of the same folder at an earlier time: what they have read is not read again.
        read_only: Whether nothing may be written there: in the folders of other runs, and without the run's lock.

    Attributes:
        dataset_pass: State of the dataset pass.
        visualizations: Shards with visualizations of each row; parts of atlas.h5 count as shards.
        total: Number of dataset images.
    """

    def __init__(
        self, plan: Plan, folder: RunFolder, previous: "Artifacts | None" = None, read_only: bool = False
    ) -> None:
        self.folder, self._read_only = folder, read_only
        self.total = len(plan.setup.dataset.images)
        self._small: dict[tuple[Path, str], dict[str, np.ndarray]] = dict(previous._small) if previous else {}
        self.dataset_pass = DatasetPass(plan, folder.shards, read_only)
        self.visualizations: dict[PlanRow, list[Shard]] = {}
        in_atlas = writer.render_groups(folder.atlas)
        for row in plan.rows:
            where = folder.shards / "render" / shards.safe_name(row.layer.name)
            digest = render_digest(plan.setup, row.layer, row.canvas, row.preset)
            found = [shard for shard in shards.find(where, digest) if self._readable(shard)]
            self.visualizations[row] = found
            # A part of the atlas counts if no shard has its channels: after `atlas compact` that is all of it.
            part = in_atlas.get((row.layer.name, digest))
            if part is not None and self._readable(part) and self.channels_in(part) - self.channels(row):
                found.append(part)

    def _readable(self, shard: Shard) -> bool:
        """Read the small arrays of a shard; one that cannot be read is renamed, with a warning."""
        key = (shard.path, shard.group_path)
        if key not in self._small:
            try:
                self._small[key] = shard.get("channels", "status")
            except DamagedShardError as error:
                if not self._read_only:
                    log.warning("%s; its work is done again", error)
                    if not shard.group_path:
                        put_aside(shard.path)
                return False
        return True

    def channels_in(self, shard: Shard) -> set[int]:
        """Return the channels that one of these shards has visualizations of."""
        small = self._small[shard.path, shard.group_path]
        return set(map(int, small["channels"][(small["status"] != "missing").all(-1)]))

    def channels(self, row: PlanRow) -> set[int]:
        """Return the channels of a row that have visualizations."""
        return {c for shard in self.visualizations[row] for c in self.channels_in(shard)}

    def failed(self, row: PlanRow) -> list[tuple[int, int]]:
        """Return (channel, variant) of the visualizations of a row whose objective did not rise."""
        failed = set()
        for small in (self._small[shard.path, shard.group_path] for shard in self.visualizations[row]):
            failed |= {(int(small["channels"][i]), int(v)) for i, v in np.argwhere(small["status"] == "failed")}
        return sorted(failed)


def put_aside(path: Path) -> Path:
    """Rename a damaged file so that it is not used, and return its new path.

    It is not removed: the cause may be a temporary fault of the file system.
    """
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    return aside
