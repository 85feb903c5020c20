"""Results of a plan that exist in a run folder: its shards, and what atlas.h5 contains of shards that are gone."""

import logging
from collections.abc import Collection
from pathlib import Path

import numpy as np

from pipeline.engine.tasks import render_digest, restart_digest
from pipeline.planning.cost_model import PlanRow
from pipeline.planning.folder import RunFolder
from pipeline.planning.plan import Plan
from pipeline.runs.dataset_pass import DatasetPass
from pipeline.runs.effects_pass import EffectsPass
from pipeline.runs.layer_images.activation_atlas import ActivationAtlasPass
from pipeline.runs.layer_images.facets import FacetsPass
from pipeline.store import shards, writer
from pipeline.store.shards import DamagedShardError, Shard
from pipeline.visualization.evaluation import RESTARTED, SILENT

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
        ignored: Damaged files of the dataset pass, which count as absent.

    Attributes:
        dataset_pass: State of the dataset pass.
        effects: State of the measurement of effects.
        activation_atlas: State of the activation atlases.
        facets: State of the facets of units.
        visualizations: Shards with visualizations of each row; parts of atlas.h5 count as shards. The first one with a
            channel provides it: shards of restarted units come first.
        total: Number of dataset images.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        previous: "Artifacts | None" = None,
        read_only: bool = False,
        ignored: Collection[Path] = frozenset(),
    ) -> None:
        self.folder, self._read_only = folder, read_only
        self._restarts: dict[PlanRow, str] = {}
        self.total = len(plan.setup.dataset.images)
        self._small: dict[tuple[Path, str], dict[str, np.ndarray]] = dict(previous._small) if previous else {}
        self.dataset_pass = DatasetPass(plan, folder.shards, read_only, ignored)
        self.effects = EffectsPass(plan, folder.shards, self.dataset_pass, ignored)
        self.activation_atlas = ActivationAtlasPass(plan, folder.shards, read_only, ignored)
        self.facets = FacetsPass(plan, folder.shards, read_only, ignored)
        self.visualizations: dict[PlanRow, list[Shard]] = {}
        in_atlas = writer.render_groups(folder.atlas)
        for row in plan.rows:
            where = folder.shards / "render" / shards.safe_name(row.layer.name)
            digest = render_digest(plan.setup, row.layer, row.canvas, row.preset)
            self._restarts[row] = restart = restart_digest(plan.setup, digest, plan.examples_digest)
            found = [shard for shard in shards.find(where, digest) if self._readable(shard, restart)]
            # Restarted units before the silent ones of the first attempts, and these before outdated restarts.
            found.sort(key=lambda shard: {restart: 0, None: 1}.get(shard.attributes.get("restart"), 2))
            self.visualizations[row] = found
            # A part of the atlas counts if no shard has its channels: after `atlas compact` that is all of it.
            part = in_atlas.get((row.layer.name, digest))
            if part is not None and self._readable(part, restart) and self.channels_in(part) - self.channels(row):
                found.append(part)

    def _readable(self, shard: Shard, restart: str) -> bool:
        """Read the small arrays of a shard; one that cannot be read is renamed, with a warning.

        Units that were restarted otherwise than by the digest `restart` count as missing.
        """
        key = (shard.path, shard.group_path)
        if key not in self._small:
            try:
                self._small[key] = shard.get("channels", "status", "reason")
            except DamagedShardError as error:
                if not self._read_only:
                    log.warning("%s; its work is done again", error)
                    if not shard.group_path:
                        put_aside(shard.path)
                return False
        if shard.attributes.get("restart", restart) != restart:
            status, reason = self._small[key]["status"], self._small[key]["reason"]
            in_vain = [text != SILENT and text.startswith(SILENT) for text in reason.ravel().tolist()]
            status[(status == RESTARTED) | np.reshape(in_vain, reason.shape)] = "missing"
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
        outcomes = self._outcomes(row).items()
        return sorted((c, int(v)) for c, (status, _) in outcomes for v in np.flatnonzero(status == "failed"))

    def reason(self, row: PlanRow, channel: int, variant: int) -> str:
        """Return the stored reason of a visualization, empty for most that did not fail."""
        return str(self._outcomes(row)[channel][1][variant])

    def silent(self, row: PlanRow) -> list[int]:
        """Return the channels of a row with a visualization that was silent from noise, and was not restarted."""
        outcomes = self._outcomes(row).items()
        return sorted(c for c, (status, reason) in outcomes if ((status == "failed") & (reason == SILENT)).any())

    def restart_digest(self, row: PlanRow) -> str:
        """Return the digest of the restart of silent units of a row."""
        return self._restarts[row]

    def _outcomes(self, row: PlanRow) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return (status, reason) of the variants of each channel of a row that has visualizations, (V,) each."""
        outcomes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for shard in self.visualizations[row]:
            small = self._small[shard.path, shard.group_path]
            present = self.channels_in(shard)
            for channel, status, reason in zip(
                small["channels"].tolist(), small["status"], small["reason"], strict=True
            ):
                if channel in present:
                    outcomes.setdefault(channel, (status, reason))
        return outcomes


def put_aside(path: Path) -> Path:
    """Rename a damaged file so that it is not used, and return its new path.

    It is not removed: the cause may be a temporary fault of the file system.
    """
    aside, number = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():  # an earlier one may hold what the later one lacks
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    path.replace(aside)
    return aside
