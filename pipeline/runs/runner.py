"""The order of stages, and what of each is still missing: plan → examples and pictures → atlas → site."""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import site
from pipeline.config.schema import Config
from pipeline.core import interrupts
from pipeline.core.errors import AtlasError
from pipeline.engine.inline import Failure, TooManyFailures, opened
from pipeline.engine.progress import ProgressReporter, Stage, WorkerStats, clock, report, told
from pipeline.engine.tasks import Done, Task
from pipeline.examples.results import DatasetPassResult
from pipeline.layers import connectivity
from pipeline.models.loading import load
from pipeline.runs import best_examples, maintenance, manifest, reuse
from pipeline.runs.artifacts import Artifacts
from pipeline.runs.dataset_pass import gaps
from pipeline.runs.folder import RunFolder, binding, write_text
from pipeline.runs.planner import Plan, make_plan
from pipeline.store import shards, writer
from pipeline.store.reader import open_atlas
from pipeline.store.shards import Damaged

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
    made = make_plan(request.config, look=lambda made: reuse.look(made, folder))
    with folder.locked():
        write_text(folder.config, request.text)
        write_text(folder.plan, made.written().to_csv(index=False))
        write_text(folder.path / manifest.NAME, made.inputs.text())
    return made


def run(request: Request, made: Plan, stages: tuple[str, ...] = ("examples", "render", "site")) -> int:
    """Do what is missing of `stages`, consolidate, build the site; returns the exit code.

    A KeyboardInterrupt ends the work and goes on to the caller; the next call goes on with the work.
    """
    folder = request.folder
    began = time.monotonic()
    if made.setup.begins and "render" in stages:
        # Pictures begin with the best photographs, so these must be known first.
        if "examples" not in stages and not Artifacts(made, folder).survey.covered:
            raise AtlasError("render.canvas.source=best needs the dataset pass first: `atlas examples` or `atlas run`.")
        if run(request, made, ("examples",)) != COMPLETE:
            return SET_ASIDE
    with folder.locked():
        shards.sweep(folder.path)
        maintenance.put_aside_unreadable(folder)
        reuse.reuse_results(made, folder, stages)
        posts: list[WorkerStats] = []
        worked: dict[str, Stage] = {}
        held: Artifacts | None = None
        while True:
            set_aside: list[Failure] = []
            held = Artifacts(made, folder, held)
            try:
                counts = _work(request, made, folder, held, stages, set_aside, posts)
            except TooManyFailures as error:
                log.error("%s", error)
                folder.write_failures([_row(failure) for failure in set_aside])
                return SET_ASIDE
            worked = {stage.name: stage for stage in counts if stage.fresh or stage.name not in worked} | worked
            held = Artifacts(made, folder, held)
            # What counts is the shards that this driver sees, not what anybody reported.
            known = [failure.task for failure in set_aside]
            for task in _tasks(made, held, stages, 1, known):
                reason = "no shard was found after the work: do all workers and this driver see the run's folder?"
                set_aside.append(Failure(task, reason, ""))
            try:
                failures = _consolidate(request, made, folder, held, set_aside)
            except Damaged as error:
                log.warning("%s; what is whole of it is kept, the rest is made again", error)
                maintenance.rescue(error.shard, folder)
                continue
            break
        if "site" in stages:
            _refresh_site(request, folder)
        totals = {
            s.name: {"done": s.done, "total": s.total, "failed": s.total - s.done} for s in _stages(made, held, stages)
        }
        whole = "site" in stages and not set_aside
        summary = report(list(worked.values()), posts, time.monotonic() - began, failures)
        folder.write_status(finished=whole, failures=failures, stages=totals, report=summary)
    for line in told(summary):
        log.info("%s", line)
    outcome = "is incomplete" if set_aside else "is complete"
    log.info("%s %s after %s%s", folder.path, outcome, clock(time.monotonic() - began), _trouble(failures))
    return SET_ASIDE if set_aside else COMPLETE


def _trouble(failures: int) -> str:
    return f"; {failures} failures are listed in failures.csv" if failures else ""


def _row(failure: Failure) -> tuple[str, str, str, str]:
    return failure.task.stage, failure.task.name, failure.reason, failure.detail


def _stages(made: Plan, held: Artifacts, stages: tuple[str, ...]) -> list[Stage]:
    """Each stage's count so far."""
    rows: list[Stage] = []
    if "examples" in stages:
        pass_ = held.survey
        todo = sum(end - start for start, end in gaps(pass_.ranges, held.total))
        each = made.examples_seconds / held.total
        rows.append(Stage("examples", "photographs", held.total, held.total - todo, each * todo))
        if pass_.covered:
            rows.append(Stage("winners", "photographs", pass_.shown, pass_.looked, each * (pass_.shown - pass_.looked)))
    if "render" in stages:
        missing = {row: len(set(row.channels) - held.channels(row)) for row in made.rows}
        cost = sum(row.cost(count) for row, count in missing.items())
        rows.append(Stage("render", "units", made.work, made.work - sum(missing.values()), cost))
    return rows


def _tasks(
    made: Plan, held: Artifacts, stages: tuple[str, ...], workers: int, known: Sequence[Task] = ()
) -> list[Task]:
    """Tasks that can be done now, without what the `known` ones are about.

    The dataset pass comes in rounds, each of which needs all of the one before: pictures wait for the last.
    """
    tasks: list[Task] = []
    where = made.config.folder.absolute() / "shards"
    if "examples" in stages:
        tasks += held.survey.tasks(workers, known)
    if "render" in stages and not any(task.stage in ("ranges", "examples") for task in tasks):
        done = {row: held.channels(row) for row in made.rows}
        named = {(row.layer.name, row.preset): row for row in made.rows}
        for task in known:
            if task.stage == "render":
                done[named[task.layer, task.preset]] |= set(task.channels)
        missing = made.render_tasks(where, done, workers)
        tasks += _beginning(made, missing) if made.setup.begins else missing
    return tasks


def _beginning(made: Plan, tasks: list[Task]) -> list[Task]:
    """The same tasks with the photographs that their pictures begin with, out of this run's atlas.h5."""
    begin = {preset.name for preset in made.config.presets if preset.needs_examples}
    if not any(task.preset in begin for task in tasks):
        return tasks
    with open_atlas(made.config.folder) as atlas:
        return [
            dataclasses.replace(t, starts=best_examples.best(atlas, t.layer, t.channels)) if t.preset in begin else t
            for t in tasks
        ]


def _work(
    request: Request,
    made: Plan,
    folder: RunFolder,
    held: Artifacts,
    stages: tuple[str, ...],
    set_aside: list[Failure],
    posts: list[WorkerStats],
) -> list[Stage]:
    """Do what is missing, round by round; returns each stage's counts of the round in which it was worked on."""
    rows = _stages(made, held, stages)
    if not _tasks(made, held, stages, 1):
        log.info("Nothing is missing: %s", "; ".join(row.line(0.0) for row in rows))
        return rows
    config = request.config.engine
    worked: dict[str, Stage] = {}
    after = made.finish_seconds if "site" in stages else 0.0
    with opened(config) as engine:
        engine.posts = posts
        while tasks := _tasks(made, held, stages, engine.pool.workers, [f.task for f in set_aside]):
            count = min(engine.pool.workers, len(tasks))
            before = len(set_aside)
            with ProgressReporter(rows, count, folder.write_status, config.progress_seconds, posts, after) as board:

                def finished(task: Task, result: Done | Failure, board: ProgressReporter = board) -> None:
                    failed = isinstance(result, Failure)
                    if isinstance(result, Failure):
                        set_aside.append(result)
                    if task.stage in board.stages:
                        board.add(task.stage, task.size, task.cost, 0.0 if failed else result.seconds, failed=failed)

                def idle(board: ProgressReporter = board) -> None:
                    interrupts.check()
                    board.beat()

                engine.execute(tasks, made.setup, finished, idle)
            worked |= {row.name: row for row in rows if row.fresh or row.name not in worked}
            held = Artifacts(made, folder, held)
            rows = _stages(made, held, stages)
            again = _tasks(made, held, stages, 1, [f.task for f in set_aside])
            if {t.path for t in again} & {t.path for t in tasks} and len(set_aside) == before:
                break  # done, they said, but there is no shard
    return list(worked.values())


def _consolidate(request: Request, made: Plan, folder: RunFolder, held: Artifacts, set_aside: list[Failure]) -> int:
    """Write atlas.h5 and failures.csv from what is finished; returns the number of failures.

    Raises `Damaged` with the first shard that can't be read to the last byte.
    """
    config = request.config
    done: DatasetPassResult | None = None
    pass_ = held.survey
    if pass_.ranges and not pass_.complete:
        log.warning("The dataset pass is not complete: atlas.h5 has no examples until it is")
    failed = pass_.sweep.failed if pass_.complete else ()
    _tell_unreadable(failed, made)
    failures = [_row(failure) for failure in set_aside]
    paths = made.setup.dataset.photos
    failures += [("examples", paths[i].path, reason, "") for i, reason in failed]
    for row in made.rows:
        for channel, variant in held.failed(row):
            what = f"{row.layer.name}:{channel} {row.preset} variant {variant}"
            failures.append(("render", what, "the objective did not rise in any attempt", ""))
    folder.write_failures(failures)
    # What the file would hold, whichever shards it comes from.
    digests = [[r.layer.name, r.preset, found[0].attributes["digest"]] for r, found in held.pictures.items() if found]
    channels = [[row.layer.name, row.channels, sorted(held.channels(row))] for row in made.rows]
    swept = pass_.identity if pass_.complete else ""
    told_of = [failure[:3] for failure in failures]
    identity = shards.digest_of([binding(request.tree), channels, digests, swept, told_of, writer.versions()])
    if writer.identity(folder.atlas) == identity:
        return len(failures)
    if pass_.complete:
        done = pass_.result
    inputs, outputs = connectivity.wires(load(config.model).to("cpu"), [layer for layer, _ in made.layers])
    content = writer.Content(
        identity=identity,
        run=config.run.name,
        model=config.model.name,
        weights=made.setup.weights,
        config_yaml=request.text,
        labels=made.labels,
        input_size=made.recipe.size,
        layers=made.layers,
        photos=paths if done else (),
        dataset_fingerprint=made.dataset_fingerprint,
        examples=done,
        inputs=inputs,
        outputs=outputs,
        failures=len(failures),
        unrendered={one.layer.name: one.reason for one in made.unrendered},
    )
    writer.consolidate(
        folder.atlas, content, {(row.layer.name, row.preset): found for row, found in held.pictures.items()}
    )
    return len(failures)


def _tell_unreadable(failed: Sequence[tuple[int, str]], made: Plan) -> None:
    """Say in the log which photographs could not be read, and how many for which reason; all of them is an error."""
    total = len(made.setup.dataset.photos)
    for index, reason in failed[:20]:
        log.warning("skipped %r: %s", made.setup.dataset.photos[index].path, reason)
    if failed:
        kinds = Counter(reason.partition(":")[0] for _, reason in failed)
        counted = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        log.warning("%d of %d photographs could not be read (%s); failures.csv lists them", len(failed), total, counted)
    if len(failed) == total:
        raise AtlasError("Not one photograph could be read: check data.root.")


def _refresh_site(request: Request, folder: RunFolder) -> None:
    """Build the site unless it shows this very atlas under these very settings."""
    shows = shards.digest_of([writer.identity(folder.atlas), dataclasses.asdict(request.config.site)])
    mark = folder.path / ".site"
    if mark.is_file() and mark.read_text() == shows and (folder.site / "index.html").is_file():
        return
    build_site(request, folder)
    write_text(mark, shows)


def build_site(request: Request, folder: RunFolder) -> None:
    """Write the pages from atlas.h5, with a line of progress now and then and a report on who will host them."""
    config = request.config
    began = told_at = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told_at
        now = time.monotonic()
        if now - told_at >= config.engine.progress_seconds and done < total:
            told_at = now
            log.info("site: %d of %d units, %.0f/s", done, total, done / max(now - began, 1e-6))

    with open_atlas(folder.path) as atlas:
        report = site.build_site(atlas, folder.site, config.site, progress)
    (folder.path / ".site").unlink(missing_ok=True)
    kept = report.units - report.made
    log.info(
        "site: %d units of %d layers in %s%s", report.units, report.layers, clock(time.monotonic() - began),
        f", {kept} of them taken over as they were" if kept else "",
    )  # fmt: skip
    if report.level:
        log.info("site: sizes are those of step %d of 4 below the best, to fit into site.max_bytes", report.level)
    for line in report.host.lines():
        log.info("%s", line)
    if report.bytes > config.site.max_bytes or report.files > config.site.max_files:
        log.warning("The site is larger than site.max_bytes or site.max_files, even at its smallest sizes")
    log.info("open %s", folder.site / "index.html")
