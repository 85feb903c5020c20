"""What a run's folder already holds of its plan: shards, and what atlas.h5 kept of shards that are gone."""

import logging
from pathlib import Path

import numpy as np

from pipeline.engine.tasks import render_digest
from pipeline.runs.cost_model import PlanRow
from pipeline.runs.dataset_pass import DatasetPass
from pipeline.runs.folder import RunFolder
from pipeline.runs.planner import Plan
from pipeline.store import shards, writer
from pipeline.store.shards import Damaged, Shard

log = logging.getLogger(__name__)


class Artifacts:
    """Finished work of a plan.

    Small arrays are read, pictures are not: those are held against their digests when they are copied into
    atlas.h5, and a damaged one is made again then. What `known` has read before is not read again. With `keep=False`
    nothing in the folder is touched: for folders of other runs, and before a run has its lock.
    """

    def __init__(self, made: Plan, folder: RunFolder, known: "Artifacts | None" = None, keep: bool = True) -> None:
        self.folder, self._keep = folder, keep
        self.total = len(made.setup.dataset.photos)
        self.small: dict[tuple[Path, str], dict[str, np.ndarray]] = dict(known.small) if known else {}
        self.survey = DatasetPass(made, folder.shards, keep)
        self.pictures: dict[PlanRow, list[Shard]] = {}
        in_atlas = writer.parts(folder.atlas)
        for row in made.rows:
            where = folder.shards / "render" / shards.safe(row.layer.name)
            digest = render_digest(made.setup, row.layer, row.canvas, row.preset)
            found = [shard for shard in shards.find(where, digest) if self._reads(shard)]
            self.pictures[row] = found
            # An atlas counts for what no shard has: after `atlas compact` that is all of it.
            part = in_atlas.get((row.layer.name, digest))
            if part is not None and self._reads(part) and self.channels_in(part) - self.channels(row):
                found.append(part)

    def _reads(self, shard: Shard) -> bool:
        """Read a shard's small arrays; one that can't be read is set aside and said so."""
        key = (shard.path, shard.inside)
        if key not in self.small:
            try:
                self.small[key] = shard.get("channels", "status")
            except Damaged as error:
                if not self._keep:
                    return False
                log.warning("%s; its work is done again", error)
                if not shard.inside:
                    put_aside(shard.path)
                return False
        return True

    def channels_in(self, shard: Shard) -> set[int]:
        """Channels whose pictures one of these shards holds."""
        small = self.small[shard.path, shard.inside]
        return set(map(int, small["channels"][(small["status"] != "missing").all(-1)]))

    def channels(self, row: PlanRow) -> set[int]:
        """Channels of a row that have their pictures."""
        return {c for shard in self.pictures[row] for c in self.channels_in(shard)}

    def failed(self, row: PlanRow) -> list[tuple[int, int]]:
        """(channel, variant) of pictures of a row that did not rise."""
        found = set()
        for small in (self.small[shard.path, shard.inside] for shard in self.pictures[row]):
            found |= {(int(small["channels"][i]), int(v)) for i, v in np.argwhere(small["status"] == "failed")}
        return sorted(found)


def put_aside(path: Path) -> Path:
    """Rename a damaged file, so that nobody takes it for whole: not removed, it may be the file system's bad moment."""
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    return aside
