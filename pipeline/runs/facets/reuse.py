"""Reuse of the facets of other runs, by digest."""

import logging
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from pipeline.planning.folder import RunFolder
from pipeline.planning.plan import Plan
from pipeline.runs.dataset_pass import gaps, without_overlap
from pipeline.runs.facets.state import FacetsPass

log = logging.getLogger(__name__)


def remaining_facets(
    plan: Plan, own: FacetsPass, others: Iterable[RunFolder], ignored: Collection[Path]
) -> tuple[int, dict[str, int]]:
    """Return the images whose responses no run has, and the facets of each layer that no run has an image of.

    Args:
        plan: The plan.
        own: The state of its run.
        others: Other runs.
        ignored: Damaged files, which count as absent.
    """
    left = own.missing_facets
    if not own.missing and not any(left.values()):
        return 0, left
    found = [own, *(facets for _, facets in _elsewhere(plan, others, ignored))]
    ranges = without_overlap(shard for one in found for shard in one.ranges.values())
    for other in found:
        left = {name: min(left[name], count) for name, count in other.missing_facets.items()}
    return sum(end - start for start, end in gaps(ranges, own.total)), left


def _elsewhere(
    plan: Plan, others: Iterable[RunFolder], ignored: Collection[Path]
) -> Iterable[tuple[RunFolder, FacetsPass]]:
    """Yield the other runs with parts of the same facets."""
    for candidate in others:
        found = FacetsPass(plan, candidate.shards, True, ignored)
        if found.ranges:
            yield candidate, found


def reuse_facets(
    plan: Plan,
    folder: RunFolder,
    others: Iterable[RunFolder],
    ignored: Collection[Path],
    link: Callable[[Path, Path], int],
) -> None:
    """Link shards of the same facets of other runs; the arguments are those of `remaining_facets`.

    Args:
        folder: The folder of the run.
        link: Links a file, and returns 1 if it did.
    """
    if plan.setup.facets is None:
        return
    own = FacetsPass(plan, folder.shards, True, ignored)
    if not own.missing and not any(own.missing_facets.values()):
        return
    for candidate, found in _elsewhere(plan, others, ignored):
        count = sum(link(path, folder.shards / path.relative_to(found.folder)) for path in found.paths())
        if count:
            log.info("Reusing the facets of %s (%d shards)", candidate.path, count)
