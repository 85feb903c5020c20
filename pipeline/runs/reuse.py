"""Reuse of results of other runs, by digest: their dataset pass and, from the base run, visualizations.

Files are linked, or copied where links are not possible; files of other runs are never changed. If the base run has
more layers or channels, the needed part of its dataset pass is copied; if it was compacted, visualizations are read
from its atlas.h5.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

from pipeline.config.schema import differences
from pipeline.core.registry import canonical
from pipeline.planning import manifest
from pipeline.planning.base_run import find_base_run, read_config
from pipeline.planning.folder import RunFolder
from pipeline.planning.plan import ExistingWork, Plan, RemainingWork
from pipeline.runs import maintenance
from pipeline.runs.artifacts import Artifacts
from pipeline.runs.dataset_pass import DatasetPass, gaps, without_overlap
from pipeline.runs.effects_pass import EffectsPass
from pipeline.runs.layer_images import rounds
from pipeline.runs.layer_images.activation_atlas import ActivationAtlasPass
from pipeline.runs.layer_images.facets import FacetsPass
from pipeline.runs.layer_images.rounds import Make
from pipeline.runs.pass_subset import PassSubset
from pipeline.store import shards
from pipeline.store.shards import DamagedShardError

log = logging.getLogger(__name__)

T = TypeVar("T")

HERE = "here already"

# Settings of the dataset pass that change no result.
NON_RESULT_SETTINGS = ("examples.per_task", "examples.compile")


def remaining_work(plan: Plan, folder: RunFolder) -> RemainingWork:
    """Return the work of a plan that remains after reusing results of `folder` and of other runs; writes nothing.

    The number of images of the second pass is 0 until the first pass is complete.
    """
    return without_damaged(lambda ignored: _remaining_work(plan, folder, ignored))


def without_damaged(work: Callable[[Collection[Path]], T]) -> T:
    """Return the result of `work`, which is called with the damaged files that it shall leave out, none at first.

    A damaged file, above all of another run, must not stop this one: its work counts as not done.
    """
    ignored: set[Path] = set()
    while True:
        try:
            return work(frozenset(ignored))
        except DamagedShardError as error:
            if error.shard.path in ignored:
                raise
            log.warning("%s; it is left out", error)
            ignored.add(error.shard.path)


def _remaining_work(plan: Plan, folder: RunFolder, ignored: Collection[Path]) -> RemainingWork:
    artifacts = Artifacts(plan, folder, read_only=True, ignored=ignored)
    base = find_base_run(plan.config)
    existing_images, missing, second_pass = _remaining_pass(plan, artifacts.dataset_pass, ignored)
    channels, existing_visualizations = _remaining_channels(plan, artifacts, base)
    sources = dict.fromkeys([*existing_images, *existing_visualizations])
    counts = {source: (existing_images.get(source, 0), existing_visualizations.get(source, 0)) for source in sources}
    existing = tuple(ExistingWork(source, *numbers) for source, numbers in counts.items() if any(numbers))
    reason = ""
    if base is not None and missing == len(plan.setup.dataset.images):
        reason = _reuse_blocker(plan, base)
    effects, relevant, connected = _remaining_effects(plan, artifacts, ignored)
    atlases_in, facets_in = _layer_images(plan, ignored)
    samples, cells = rounds.remaining(artifacts.activation_atlas, atlases_in, candidate_runs(plan))
    responses, facets = rounds.remaining(artifacts.facets, facets_in, candidate_runs(plan))
    return RemainingWork(
        channels,
        missing,
        second_pass,
        existing,
        reason,
        effects=effects,
        relevant=relevant,
        connected=connected,
        samples=samples,
        cells=cells,
        responses=responses,
        facets=facets,
    )


def _layer_images(plan: Plan, ignored: Collection[Path]) -> tuple[Make[ActivationAtlasPass], Make[FacetsPass]]:
    """Return what makes the states of activation atlases and facets in folders in which nothing may be written."""
    return (
        lambda folder: ActivationAtlasPass(plan, folder, True, ignored),
        lambda folder: FacetsPass(plan, folder, True, ignored),
    )


def _reuse_layer_images(plan: Plan, folder: RunFolder, ignored: Collection[Path]) -> None:
    """Link shards of the same activation atlases and facets of other runs."""
    for make in _layer_images(plan, ignored):
        rounds.reuse(folder, make, candidate_runs(plan), _link)


def _remaining_effects(plan: Plan, artifacts: Artifacts, ignored: Collection[Path]) -> tuple[int, int, int]:
    """Return the numbers of images left for effects, relevance and connections, which no run has measured."""
    own = artifacts.effects
    if own.nothing_missing:
        return 0, 0, 0
    found = [own, *(effects for _, effects in _effects_elsewhere(plan, ignored))]
    ranges = without_overlap(shard for effects in found for shard in effects.ranges.values())
    missing = sum(end - start for start, end in gaps(ranges, own.total))
    connected = without_overlap(shard for effects in found for shard in effects.connection_ranges.values())
    unconnected = sum(end - start for start, end in gaps(connected, own.connected))
    return missing, 0 if any(effects.complete for effects in found) else own.relevant_missing, unconnected


def _effects_elsewhere(plan: Plan, ignored: Collection[Path]) -> Iterator[tuple[RunFolder, EffectsPass]]:
    """Yield the other runs with parts of the same effects."""
    for candidate in candidate_runs(plan):
        same_pass = DatasetPass(plan, candidate.shards, True, ignored)
        effects = EffectsPass(plan, candidate.shards, same_pass, ignored)
        if effects.ranges or effects.connection_ranges:
            yield candidate, effects


def _reuse_effects(plan: Plan, folder: RunFolder, ignored: Collection[Path]) -> None:
    """Link shards of the same effects of other runs."""
    effects = Artifacts(plan, folder, ignored=ignored).effects
    if effects.nothing_missing:
        return
    for candidate, effects in _effects_elsewhere(plan, ignored):
        count = sum(_link(path, folder.shards / path.relative_to(effects.folder)) for path in effects.paths())
        if count:
            log.info("Reusing the effects of %s (%d shards)", candidate.path, count)


def _remaining_pass(
    plan: Plan, dataset_pass: DatasetPass, ignored: Collection[Path]
) -> tuple[dict[str, int], int, int]:
    """Return the existing images of the first pass by source, and the missing images of the first and second pass."""
    total = len(plan.setup.dataset.images)
    existing = {HERE: dataset_pass.swept}
    missing = total - dataset_pass.swept
    second_pass = dataset_pass.to_localize - dataset_pass.localized if dataset_pass.covered else 0
    for candidate in candidate_runs(plan):
        if not missing and not second_pass:
            break
        same_pass, subset = _reusable_pass(plan, dataset_pass, candidate, ignored)
        if subset is not None and subset.can_copy_first_pass(dataset_pass):
            still_missing = 0
        else:
            ranges = [*dataset_pass.swept_ranges, *(same_pass.swept_ranges if same_pass is not None else ())]
            still_missing = sum(end - start for start, end in gaps(ranges, total))
        if still_missing < missing:
            existing[f"from {candidate.path}"] = missing - still_missing
        missing = still_missing
        second_pass_copied = subset is not None and subset.covers_channels and not still_missing
        if second_pass_copied or (same_pass is not None and same_pass.complete):
            second_pass = 0
    return existing, missing, second_pass


def _remaining_channels(
    plan: Plan, artifacts: Artifacts, base: RunFolder | None
) -> tuple[dict[tuple[str, str], int], dict[str, int]]:
    """Return the number of missing channels by (layer, preset), and the existing visualizations by source."""
    missing: dict[tuple[str, str], int] = {}
    existing = {HERE: 0}
    base_artifacts = Artifacts(plan, base, read_only=True) if base is not None else None
    for row in plan.rows:
        variants = plan.config.preset(row.preset).variants
        finished = artifacts.channels(row) & set(row.channels)
        reusable: set[int] = set()
        if base_artifacts is not None:
            reusable = (base_artifacts.channels(row) & set(row.channels)) - finished
        missing[row.layer.name, row.preset] = len(row.channels) - len(finished) - len(reusable)
        existing[HERE] += len(finished) * variants
        if base is not None and reusable:
            source = f"from {base.path}"
            existing[source] = existing.get(source, 0) + len(reusable) * variants
    return missing, existing


def _reuse_blocker(plan: Plan, base: RunFolder) -> str:
    """Return why the dataset pass of a base run can't be reused."""
    base_config, base_manifest = read_config(base), manifest.read(base.path)
    changed: list[str] = []
    if base_config is not None:
        changed = differences(canonical(base_config.examples), canonical(plan.config.examples), "examples.")
    changed = [line for line in changed if not line.startswith(NON_RESULT_SETTINGS)]
    missing: list[str] = []
    if base_manifest is not None:
        taps = [layer.tap for layer, _ in base_manifest.layers]
        missing = [layer.name for layer, _ in plan.layers if layer.tap not in taps]
    if missing and not changed:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        return f"{base.path} has no {missing[0]}{more}"
    return ", ".join(changed) or f"the dataset pass of {base.path} is not complete"


def reuse_results(plan: Plan, folder: RunFolder, stages: tuple[str, ...]) -> None:
    """Link or copy reusable results of other runs for `stages` into `folder`, whose lock the caller holds."""
    if "examples" in stages:
        without_damaged(lambda ignored: _reuse_pass(plan, folder, ignored))
        without_damaged(lambda ignored: _reuse_effects(plan, folder, ignored))
        without_damaged(lambda ignored: _reuse_layer_images(plan, folder, ignored))
    base = find_base_run(plan.config)
    if "render" in stages and base is not None:
        _reuse_visualizations(plan, folder, base)


def candidate_runs(plan: Plan) -> Iterator[RunFolder]:
    """Yield the runs whose dataset pass may be reused: the base run, then the runs beside this one."""
    folder = plan.config.folder.resolve()
    base = find_base_run(plan.config)
    bases = [base] if base is not None else []
    # Whoever may write beside this run could offer files with the right digests: only those of the same owner count.
    owners = {os.geteuid(), _owner(folder)} - {None}
    paths = [path for path in sorted(folder.parent.glob("*/shards")) if _owner(path) in owners]
    siblings = [RunFolder(path.parent) for path in paths]
    visited = {folder}
    for candidate in [*bases, *siblings]:
        if candidate.path.resolve() not in visited:
            visited.add(candidate.path.resolve())
            yield candidate


def _owner(path: Path) -> int | None:
    """Return the owner of a file or folder; None if there is none."""
    try:
        return path.stat().st_uid
    except OSError:
        return None


def _reusable_pass(
    plan: Plan, dataset_pass: DatasetPass, candidate: RunFolder, ignored: Collection[Path]
) -> tuple[DatasetPass | None, PassSubset | None]:
    """Return the candidate's dataset pass if it is the plan's, and the plan's subset of it if it is the base run."""
    same_pass: DatasetPass | None = DatasetPass(plan, candidate.shards, True, ignored)
    if not same_pass.swept_ranges or (dataset_pass.content and dataset_pass.content != same_pass.content):
        same_pass = None
    base = find_base_run(plan.config)
    if base is None or base.path != candidate.path:
        return same_pass, None
    subset = PassSubset.of(plan, candidate, ignored)
    if subset is not None and not subset.source.complete:
        subset = None
    return same_pass, subset


def _reuse_pass(plan: Plan, folder: RunFolder, ignored: Collection[Path]) -> None:
    """Link shards of the same dataset pass of other runs, and copy the subset of the base run's."""
    for candidate in candidate_runs(plan):
        dataset_pass = DatasetPass(plan, folder.shards, ignored=ignored)
        if dataset_pass.complete:
            break
        same_pass, subset = _reusable_pass(plan, dataset_pass, candidate, ignored)
        count = 0
        if same_pass is not None:
            count = sum(_link(path, folder.shards / path.relative_to(same_pass.folder)) for path in same_pass.paths())
            dataset_pass = DatasetPass(plan, folder.shards, ignored=ignored)
        if subset is not None and not dataset_pass.complete:
            if not dataset_pass.covered and subset.can_copy_first_pass(dataset_pass):
                count += subset.write_first_pass(dataset_pass)
                dataset_pass = DatasetPass(plan, folder.shards, ignored=ignored)
            if dataset_pass.covered and subset.covers_channels:
                count += subset.write_second_pass(dataset_pass)
        if count:
            log.info("Reusing the dataset pass of %s (%d shards)", candidate.path, count)


def _reuse_visualizations(plan: Plan, folder: RunFolder, base: RunFolder) -> None:
    """Link shards of the base run with missing visualizations, or copy these from its atlas.h5."""
    artifacts, base_artifacts = Artifacts(plan, folder), Artifacts(plan, base, read_only=True)
    count = 0
    for row in plan.rows:
        missing = set(row.channels) - artifacts.channels(row)
        missing_before = len(missing)
        for shard in base_artifacts.visualizations[row]:
            reusable = base_artifacts.channels_in(shard) & missing
            if not reusable:
                continue
            if shard.group_path:
                maintenance.copy_visualizations(shard, folder, reusable)
            else:
                _link(shard.path, folder.shards / "render" / shards.safe_name(row.layer.name) / shard.path.name)
            missing -= reusable
        count += (missing_before - len(missing)) * plan.config.preset(row.preset).variants
    if count:
        log.info("Reusing %d visualizations of %s", count, base.path)


def _link(path: Path, target: Path) -> int:
    """Link or copy a finished file; return 1, or 0 if the target exists or the file does not."""
    if target.exists():
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp-{os.uname().nodename}-{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        temporary.replace(target)
        return 1
    return 0
