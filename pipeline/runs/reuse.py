"""What former runs lend a plan, by digest: pieces of their dataset pass and, from the run that `base` names, pictures.

Files are linked, or copied where links can't be made; none of another run's is ever changed. Of a base with more
layers or channels the part that is asked for is cut out, and of a compacted one the pictures come out of its atlas.h5.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.schema import differences
from pipeline.core.registry import canonical
from pipeline.runs import maintenance, manifest
from pipeline.runs.artifacts import Artifacts
from pipeline.runs.base_run import based_on, settings
from pipeline.runs.dataset_pass import DatasetPass, gaps
from pipeline.runs.folder import RunFolder
from pipeline.runs.pass_subset import PassSubset
from pipeline.runs.planner import ExistingWork, Plan, RemainingWork
from pipeline.store import shards

log = logging.getLogger(__name__)

HERE = "here already"


def look(made: Plan, folder: RunFolder) -> RemainingWork:
    """What of a plan is still to be made, when all that `folder` has and others would lend is counted; writes nothing.

    How many photographs are to be looked at again is 0 as long as nobody knows.
    """
    total = len(made.setup.dataset.photos)
    own = Artifacts(made, folder, keep=False)
    held = {HERE: [own.survey.swept, 0]}
    missing = total - own.survey.swept
    looks = own.survey.shown - own.survey.looked if own.survey.covered else 0
    for lender in lenders(made):
        if not missing and not looks:
            break
        lent, excerpt = _offer(made, own.survey, lender)
        ranges = [*own.survey.ranges, *(lent.ranges if lent else ())]
        left = 0 if excerpt and excerpt.fits(own.survey) else sum(end - start for start, end in gaps(ranges, total))
        done = (excerpt is not None and excerpt.shows and not left) or (lent is not None and lent.complete)
        if left < missing:
            held[f"from {lender.path}"] = [missing - left, 0]
        missing, looks = left, 0 if done else looks
    channels: dict[tuple[str, str], int] = {}
    base = based_on(made.config)
    theirs = Artifacts(made, base, keep=False) if base else None
    for row in made.rows:
        variants = made.config.preset(row.preset).variants
        mine = own.channels(row) & set(row.channels)
        lent_too = (theirs.channels(row) & set(row.channels)) - mine if theirs else set()
        channels[row.layer.name, row.preset] = len(row.channels) - len(mine) - len(lent_too)
        held[HERE][1] += len(mine) * variants
        if base and lent_too:
            held.setdefault(f"from {base.path}", [0, 0])[1] += len(lent_too) * variants
    there = tuple(ExistingWork(where, *counts) for where, counts in held.items() if any(counts))
    lent_none = base is not None and missing == total
    return RemainingWork(channels, missing, looks, there, _obstacle(made, base) if base and lent_none else "")


def _obstacle(made: Plan, base: RunFolder) -> str:
    """Why a base does not lend its dataset pass."""
    theirs, known = settings(base), manifest.read(base.path)
    apart = differences(canonical(theirs.examples), canonical(made.config.examples), "examples.") if theirs else []
    apart = [d for d in apart if not d.startswith(("examples.per_task", "examples.compile"))]  # these change nothing
    taps = [layer.tap for layer, _ in known.layers] if known else []
    others = [layer.name for layer, _ in made.layers if layer.tap not in taps] if known else []
    if others and not apart:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        return f"{base.path} has no {others[0]}{more}"
    return ", ".join(apart) or f"that of {base.path} is not complete"


def reuse_results(made: Plan, folder: RunFolder, stages: tuple[str, ...]) -> None:
    """Bring what others lend for `stages` into `folder`, whose lock the caller holds."""
    if "examples" in stages:
        _lend_pass(made, folder)
    base = based_on(made.config)
    if "render" in stages and base is not None:
        _lend_pictures(made, folder, base)


def lenders(made: Plan) -> Iterator[RunFolder]:
    """Runs whose dataset pass may be taken over: the base, then those beside this one."""
    own = made.config.folder.resolve()
    base = based_on(made.config)
    first = [base] if base else []
    beside = [RunFolder(path.parent) for path in sorted(own.parent.glob("*/shards"))]
    seen = {own}
    for lender in [*first, *beside]:
        if lender.path.resolve() not in seen:
            seen.add(lender.path.resolve())
            yield lender


def _offer(made: Plan, own: DatasetPass, lender: RunFolder) -> tuple[DatasetPass | None, PassSubset | None]:
    """A lender's pass, if it is this very one, and the excerpt of it; a run that is not the base gives none."""
    lent: DatasetPass | None = DatasetPass(made, lender.shards, keep=False)
    if lent is not None and (not lent.ranges or (own.content and own.content != lent.content)):
        lent = None
    base = based_on(made.config)
    excerpt = PassSubset.of(made, lender) if base is not None and base.path == lender.path else None
    return lent, excerpt if excerpt and excerpt.lender.complete else None


def _lend_pass(made: Plan, folder: RunFolder) -> None:
    for lender in lenders(made):
        own = DatasetPass(made, folder.shards)
        if own.complete:
            break
        lent, excerpt = _offer(made, own, lender)
        count = 0
        if lent is not None:
            count = sum(_link(path, folder.shards / path.relative_to(lent.folder)) for path in lent.paths())
            own = DatasetPass(made, folder.shards)
        if excerpt is not None and not own.complete:
            if not own.covered and excerpt.fits(own):
                count += excerpt.write_sweep(own)
                own = DatasetPass(made, folder.shards)
            if own.covered and excerpt.shows:
                count += excerpt.write_looks(own)
        if count:
            log.info("the dataset pass of %s is used again (%d shards)", lender.path, count)


def _lend_pictures(made: Plan, folder: RunFolder, base: RunFolder) -> None:
    own, theirs = Artifacts(made, folder), Artifacts(made, base, keep=False)
    count = 0
    for row in made.rows:
        wanted = set(row.channels) - own.channels(row)
        before = len(wanted)
        for shard in theirs.pictures[row]:
            given = theirs.channels_in(shard) & wanted
            if not given:
                continue
            if shard.inside:
                maintenance.copy_pictures(shard, folder, given)
            else:
                _link(shard.path, folder.shards / "render" / shards.safe(row.layer.name) / shard.path.name)
            wanted -= given
        count += (before - len(wanted)) * made.config.preset(row.preset).variants
    if count:
        log.info("%d pictures of %s are used again", count, base.path)


def _link(path: Path, target: Path) -> int:
    """Link or copy a finished file; returns 1, or 0 where there is one by that name, or none to link."""
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
