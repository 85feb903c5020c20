"""The order of stages, and what of each is still missing: plan → examples and pictures → atlas → site."""

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import examples, shards, site, store
from pipeline.atlas import open_atlas
from pipeline.config import Config
from pipeline.engine import Failure, TooManyFailures, execute
from pipeline.errors import AtlasError
from pipeline.examples import Sweep
from pipeline.folder import RunFolder, binding, write_text
from pipeline.plan import Plan, make_plan
from pipeline.progress import Board, Stage, clock
from pipeline.shards import Shard
from pipeline.worker import Done, Task, render_digest

log = logging.getLogger(__name__)

COMPLETE, SET_ASIDE, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@dataclasses.dataclass(frozen=True)
class Request:
    """What a command was asked for: the typed configuration, the same as plain data, and as text to keep."""

    config: Config
    tree: Mapping[str, Any]
    text: str

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.config.folder)


def plan(request: Request) -> Plan:
    """Make the plan and write plan.csv. Touches no folder before everything asked for was found."""
    folder = request.folder
    folder.check(request.tree, request.config.run.update)
    made = make_plan(request.config)
    with folder.locked():
        write_text(folder.config, request.text)
        write_text(folder.plan, made.written().to_csv(index=False))
    return made


def run(request: Request, made: Plan, stages: tuple[str, ...] = ("examples", "render", "site")) -> int:
    """Do what is missing of `stages`, consolidate, build the site; returns the exit code.

    A KeyboardInterrupt ends the work and goes on to the caller; the next call goes on with the work.
    """
    folder = request.folder
    began = time.monotonic()
    with folder.locked():
        shards.sweep(folder.path)
        set_aside: list[Failure] = []
        finished = Finished(made, folder)
        tasks, counts = _missing(made, finished, stages)
        try:
            _work(request, made, folder, tasks, counts, set_aside)
        except TooManyFailures as error:
            log.error("%s", error)
            folder.write_failures([_row(failure) for failure in set_aside])
            return SET_ASIDE
        finished = Finished(made, folder, finished)
        # What counts is the shards that this driver sees, not what anybody reported.
        left, counts = _missing(made, finished, stages)
        known = {failure.task.path for failure in set_aside}
        for task in left:
            if task.path not in known:
                reason = "no shard was found after the work: do all workers and this driver see the run's folder?"
                set_aside.append(Failure(task, reason, ""))
        failures = _consolidate(request, made, folder, finished, set_aside)
        if "site" in stages:
            _refresh_site(request, folder)
        totals = {s.name: {"done": s.done, "total": s.total, "failed": s.total - s.done} for s in counts}
        whole = "site" in stages and not set_aside
        folder.write_status(finished=whole, failures=failures, stages=totals)
    outcome = "is incomplete" if set_aside else "is complete"
    log.info("%s %s after %s%s", folder.path, outcome, clock(time.monotonic() - began), _trouble(failures))
    return SET_ASIDE if set_aside else COMPLETE


def _trouble(failures: int) -> str:
    return f"; {failures} failures are listed in failures.csv" if failures else ""


def _row(failure: Failure) -> tuple[str, str, str, str]:
    return failure.task.stage, failure.task.name, failure.reason, failure.detail


class Finished:
    """What the run's folder holds of this plan: shards that can be read to the last byte and bear its digests.

    Shards that `known` has read before are not read again.
    """

    def __init__(self, made: Plan, folder: RunFolder, known: "Finished | None" = None) -> None:
        self.read: dict[Path, dict[str, np.ndarray]] = dict(known.read) if known else {}
        self.ranges: dict[tuple[int, int], Shard] = {}
        self.pictures: dict[str, list[Shard]] = {}
        for shard in self._whole(folder.shards / "examples", made.examples_digest, ()):
            self.ranges[int(shard.attributes["start"]), int(shard.attributes["end"])] = shard
        for row in made.rows:
            where = folder.shards / "render" / shards.safe(row.layer.name)
            digest = render_digest(made.setup, row.layer, row.canvas)
            self.pictures[row.layer.name] = self._whole(where, digest, ("channels", "status"))

    def _whole(self, where: Path, digest: str, keep: tuple[str, ...]) -> list[Shard]:
        whole = []
        for shard in shards.find(where, digest):
            if shard.path not in self.read:
                try:
                    arrays = shard.arrays()
                except (OSError, KeyError):
                    log.warning("%s is damaged; its work is done again", shard.path)
                    # Set aside, not removed: it may have been the file system's bad moment.
                    shard.path.replace(shard.path.with_name(f"{shard.path.name}.damaged"))
                    continue
                self.read[shard.path] = {name: arrays[name] for name in keep}
            whole.append(shard)
        return whole

    def channels(self, layer: str) -> set[int]:
        """Channels of a layer that have their pictures."""
        return {int(c) for shard in self.pictures[layer] for c in self.read[shard.path]["channels"]}

    def failed(self, layer: str) -> list[tuple[int, int]]:
        """(channel, variant) of pictures of a layer that did not rise."""
        found = []
        for arrays in (self.read[shard.path] for shard in self.pictures[layer]):
            found += [(int(arrays["channels"][i]), int(v)) for i, v in np.argwhere(arrays["status"] == "failed")]
        return sorted(found)


def _missing(made: Plan, finished: Finished, stages: tuple[str, ...]) -> tuple[list[Task], list[Stage]]:
    """Tasks still to do, and each stage's count so far."""
    tasks: list[Task] = []
    rows: list[Stage] = []
    where = made.config.folder.absolute() / "shards"
    if "examples" in stages:
        own = made.examples_tasks(where, set(finished.ranges))
        total = len(made.setup.dataset.photos)
        rows.append(Stage("examples", "photographs", total, total - sum(t.size for t in own), _cost(own)))
        tasks += own
    if "render" in stages:
        own = made.render_tasks(where, {row.layer.name: finished.channels(row.layer.name) for row in made.rows})
        rows.append(Stage("render", "units", made.units, made.units - sum(t.size for t in own), _cost(own)))
        tasks += own
    return tasks, rows


def _cost(tasks: list[Task]) -> float:
    return sum(task.cost for task in tasks)


def _work(
    request: Request, made: Plan, folder: RunFolder, tasks: list[Task], rows: list[Stage], set_aside: list[Failure]
) -> None:
    if not tasks:
        log.info("Nothing is missing: %s", "; ".join(row.line(0.0) for row in rows))
        return
    every = request.config.engine.progress_seconds
    with Board(rows, min(made.crew.workers, len(tasks)), folder.write_status, every) as board:

        def finished(task: Task, result: Done | Failure) -> None:
            if isinstance(result, Failure):
                set_aside.append(result)
                board.add(task.stage, task.size, task.cost, 0.0, failed=True)
            else:
                board.add(task.stage, task.size, task.cost, result.seconds)

        execute(tasks, made.setup, request.config.engine, finished, board.beat)


def _consolidate(request: Request, made: Plan, folder: RunFolder, finished: Finished, set_aside: list[Failure]) -> int:
    """Write atlas.h5 and failures.csv from what is finished; returns the number of failures."""
    config = request.config
    rendered, ranges = finished.pictures, finished.ranges
    names = [row.layer.name for row in made.rows]
    sweep: Sweep | None = None
    if ranges and not all(r in ranges for r in made.ranges):
        log.warning("The dataset pass is not complete: atlas.h5 has no examples until it is")
    if all(r in ranges for r in made.ranges):
        parts = [Sweep.from_arrays(names, ranges[r].arrays()) for r in made.ranges]
        sweep = examples.merge(parts, config.examples.k)
        _tell_unreadable(sweep, made)
    failures = [_row(failure) for failure in set_aside]
    paths = made.setup.dataset.photos
    failures += [("examples", paths[i].path, reason, "") for i, reason in (sweep.failed if sweep else ())]
    for row in made.rows:
        for channel, variant in finished.failed(row.layer.name):
            what = f"{row.layer.name}:{channel} variant {variant}"
            failures.append(("render", what, "the objective did not rise in any attempt", ""))
    folder.write_failures(failures)
    # What the file would hold, without opening a picture: the same shards under the same configuration.
    found = sorted(str(s.path.relative_to(folder.path)) for r in rendered.values() for s in r)
    found += sorted(str(s.path.relative_to(folder.path)) for s in ranges.values())
    channels = [[row.layer.name, row.channels] for row in made.rows]
    identity = shards.digest_of([binding(request.tree), channels, found, failures, store.versions()])
    if store.identity(folder.atlas) == identity:
        return len(failures)
    shown: dict[str, np.ndarray] = {}
    if sweep is not None:
        wanted: set[int] = set()
        for row in made.rows:
            wanted |= set(sweep.tops[row.layer.name].index[list(row.channels)].ravel().tolist())
        shown = examples.shown(made.setup.dataset, sorted(wanted - {-1}), made.recipe, config.examples)
    content = store.Content(
        identity=identity,
        run=config.run.name,
        model=config.model.name,
        weights=made.setup.weights,
        config_yaml=request.text,
        labels=made.labels,
        input_size=made.recipe.size,
        layers=[(row.layer, row.channels) for row in made.rows],
        photos=paths if sweep else (),
        dataset_fingerprint=made.dataset_fingerprint,
        examples=sweep,
        shown=shown,
        failures=len(failures),
    )
    store.consolidate(folder.atlas, content, rendered)
    return len(failures)


def _tell_unreadable(sweep: Sweep, made: Plan) -> None:
    """Say in the log which photographs could not be read; none at all is an error."""
    total = len(made.setup.dataset.photos)
    for index, reason in sweep.failed[:20]:
        log.warning("skipped %r: %s", made.setup.dataset.photos[index].path, reason)
    if sweep.failed:
        log.warning("%d of %d photographs could not be read; failures.csv lists them", len(sweep.failed), total)
    if len(sweep.failed) == total:
        raise AtlasError("Not one photograph could be read: check data.root.")


def _refresh_site(request: Request, folder: RunFolder) -> None:
    """Build the site unless it shows this very atlas under these very settings."""
    shows = shards.digest_of([store.identity(folder.atlas), dataclasses.asdict(request.config.site)])
    mark = folder.path / ".site"
    if mark.is_file() and mark.read_text() == shows and (folder.site / "index.html").is_file():
        return
    build_site(request, folder)
    write_text(mark, shows)


def build_site(request: Request, folder: RunFolder) -> None:
    """Write the pages from atlas.h5."""
    with open_atlas(folder.path) as atlas:
        report = site.build_site(atlas, folder.site, request.config.site)
    (folder.path / ".site").unlink(missing_ok=True)
    log.info("site: %d files, %.1f MB; open %s", report.files, report.bytes / 1e6, folder.site / "index.html")


def verify(folder: RunFolder) -> list[tuple[str, str]]:
    """What is wrong with a run, as (where, what)."""
    if not folder.atlas.is_file():
        raise AtlasError(f"{folder.path} has no atlas.h5 yet; `atlas run` makes it.")
    return store.verify(folder.atlas, folder.planned())
