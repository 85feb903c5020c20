"""Execution of a plan, stage by stage: dataset pass and visualizations, atlas.h5, site."""

import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pipeline.core import atomic_io, interrupts
from pipeline.core.errors import AtlasError
from pipeline.core.formatting import clock
from pipeline.engine.base import Engine, Failure, TooManyFailures
from pipeline.engine.factory import open_engine
from pipeline.engine.progress import ProgressReporter, Stage, WorkerStats, report_lines, run_report
from pipeline.engine.tasks import Done, RangesTask, RenderTask, SweepTask, Task, device_kind
from pipeline.layers.heads import HeadLayer
from pipeline.planning import execution, heads, manifest, natural_deviations
from pipeline.planning.base_run import fetch_base_run
from pipeline.planning.folder import RunFolder, write_text
from pipeline.planning.plan import Plan
from pipeline.planning.planner import make_plan
from pipeline.planning.request import Request
from pipeline.runs import best_examples, maintenance, reuse, silent_units
from pipeline.runs.artifacts import Artifacts
from pipeline.runs.consolidate import consolidate, failure_row
from pipeline.runs.dataset_pass import gaps
from pipeline.runs.judging import judge_visualizations
from pipeline.runs.pages import refresh_site
from pipeline.store.reader import open_atlas
from pipeline.store.shards import DamagedShardError

log = logging.getLogger(__name__)

# Why a task is set aside although its worker reported it as done.
NO_SHARD = "no shard was found after the work: do all workers and this driver see the run's folder?"

# Exit codes (docs/README.md lists them). A job that is started again by its system need not be after the first three.
# 75 is `TryAgainError.exit_code`; 70 is EX_SOFTWARE of sysexits.h.
COMPLETE, SET_ASIDE, BAD_INPUT, CRASHED, INTERRUPTED = 0, 1, AtlasError.exit_code, 70, 130

STAGES = ("examples", "render", "site")


def plan_run(request: Request) -> Plan:
    """Make the plan of a run and write plan.csv, under the lock of the run folder.

    Raises:
        AtlasError: If anything in the input is wrong; nothing is written then.
    """
    request.folder.check_writable()
    with request.folder.locked():
        fetch_base_run(request.config)
        return _planned(request)


def plan_and_run(request: Request, stages: tuple[str, ...] = STAGES, show: Callable[[Plan], None] | None = None) -> int:
    """Plan a run and execute the plan under one lock of the run folder; return the exit code.

    Args:
        request: The request.
        stages: Stages to execute.
        show: Function that is called with the plan before the plan is executed.

    Raises:
        AtlasError: If anything in the input is wrong, or another command is at work in the folder.
    """
    request.folder.check_writable()
    with request.folder.locked():
        fetch_base_run(request.config)
        plan = _planned(request)
        if show is not None:
            show(plan)
        return _run(request, plan, stages)


def _planned(request: Request) -> Plan:
    folder = request.folder
    folder.check_config(request.tree, request.config.run.update)
    plan = make_plan(request.config, remaining_work=lambda plan: reuse.remaining_work(plan, folder))
    _check_same_dataset(request, plan)
    _record(request, plan)
    return plan


def _check_same_dataset(request: Request, plan: Plan) -> None:
    """Check that images which have moved are those that the run was made with.

    Raises:
        AtlasError: If they are others.
    """
    folder, recorded = request.folder, manifest.read(request.folder.path)
    if request.config.run.update or recorded is None or not folder.config.is_file() or folder.unused:
        return
    before = (folder.read_config().get("data") or {}).get("root")
    if before != request.config.data.root and recorded.dataset != plan.dataset_fingerprint:
        raise AtlasError(
            f"{folder} was made with other images: data.root={before}, and those of {request.config.data.root} "
            "have other paths or sizes. Give the new run another name (run.name=…), or continue this one with the new "
            "images (run.update=true)."
        )


def _record(request: Request, plan: Plan) -> None:
    """Write configuration, plan and manifest to the run folder, whose lock is held.

    Raises:
        AtlasError: If the folder holds results of another configuration.
    """
    folder = request.folder
    folder.check_config(request.tree, request.config.run.update)
    write_text(folder.config, request.text)
    write_text(folder.plan, plan.written().to_csv(index=False))
    write_text(folder.path / manifest.NAME, plan.inputs.text())
    heads.write(folder.path, [layer for layer in plan.setup.others if isinstance(layer, HeadLayer)])
    if plan.setup.natural is not None:
        key = natural_deviations.identity(plan.network, plan.dataset_fingerprint)
        natural_deviations.write(folder.path, plan.setup.natural, key)


def run(request: Request, plan: Plan, stages: tuple[str, ...] = STAGES) -> int:
    """Compute what is missing of `stages`, write atlas.h5 and build the site; return the exit code.

    A KeyboardInterrupt stops the work and is raised again; the next call continues.
    """
    with request.folder.locked():
        if _recorded_text(request.folder) != request.text:
            # Another command has planned a run in this folder in the meantime.
            _record(request, plan)
        return _run(request, plan, stages)


def _recorded_text(folder: RunFolder) -> str:
    return folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""


def _run(request: Request, plan: Plan, stages: tuple[str, ...]) -> int:
    """Execute a plan that is recorded in its folder, whose lock is held."""
    folder = request.folder
    # Visualizations that start from the best dataset examples need the dataset pass first.
    begins = bool(plan.setup.begins) and "render" in stages
    if begins and "examples" not in stages and not Artifacts(plan, folder, read_only=True).dataset_pass.covered:
        setting = "render.canvas.source=best" if _needs_examples(plan) else "render.objective.target=mean"
        raise AtlasError(f"{setting} needs the dataset pass first: `atlas examples` or `atlas run`.")
    atomic_io.remove_temporary_files(folder.path)
    maintenance.set_aside_unreadable_atlas(folder)
    maintenance.set_aside_unreadable_shards(folder)
    maintenance.set_aside_outdated_pass(plan, folder)
    code = COMPLETE
    with _marked(folder) as mark:
        plan = dataclasses.replace(plan, setup=dataclasses.replace(plan.setup, mark=str(mark)))
        for part in [("examples",), stages] if begins else [stages]:
            if code != COMPLETE:
                return SET_ASIDE
            reuse.reuse_results(plan, folder, part)
            code = _Session(request, plan, part).run()
    return code


@contextlib.contextmanager
def _marked(folder: RunFolder) -> Iterator[Path]:
    """Yield a file in the run folder by which workers know whether they see it.

    Its name is that of a temporary file: if this process is killed, the next run removes it.
    """
    mark = folder.path.absolute() / f".seen.tmp-{secrets.token_hex(8)}"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def _needs_examples(plan: Plan) -> bool:
    return any(preset.needs_examples for preset in plan.config.presets)


class _Session:
    """One execution of a plan, under the lock of the run folder."""

    def __init__(self, request: Request, plan: Plan, stages: tuple[str, ...]) -> None:
        self.request, self.plan, self.stages = request, plan, stages
        self.folder: RunFolder = request.folder
        self.stats: list[WorkerStats] = []
        self.set_aside: list[Failure] = []
        self.progress: dict[str, Stage] = {}  # of each stage, in the round in which it was worked on
        self.artifacts = Artifacts(plan, self.folder)

    def run(self) -> int:
        """Work until nothing is missing or can be done, then consolidate; return the exit code."""
        began = time.monotonic()
        while True:
            self.set_aside.clear()
            try:
                self._work()
                self._note_missing_shards()
            except TooManyFailures as error:
                log.error("%s", error)
                self.folder.write_failures([failure_row(failure) for failure in self.set_aside])
                return SET_ASIDE
            except DamagedShardError as error:
                self._rescue(error)
                continue
            try:
                judgements = judge_visualizations(self.plan, self.artifacts)
                failures = consolidate(self.request, self.plan, self.artifacts, self.set_aside, judgements)
            except DamagedShardError as error:
                self._rescue(error)
                continue
            break
        if "site" in self.stages:
            refresh_site(self.request, self.folder)
        self._finish(began, failures)
        return SET_ASIDE if self.set_aside else COMPLETE

    def _rescue(self, error: DamagedShardError) -> None:
        """Keep what is intact of a damaged shard, and set the file aside."""
        log.warning("%s; what is intact of it is kept, the rest is made again", error)
        maintenance.rescue(error.shard, self.folder)
        self._refresh()

    def _finish(self, began: float, failures: int) -> None:
        """Write status.json and log the report."""
        totals = {
            stage.name: {"done": stage.done, "total": stage.total, "failed": stage.total - stage.done}
            for stage in self._counts()
        }
        finished = "site" in self.stages and not self.set_aside
        report = run_report(list(self.progress.values()), self.stats, time.monotonic() - began, failures)
        self.folder.write_status(finished=finished, failures=failures, stages=totals, report=report)
        for line in report_lines(report):
            log.info("%s", line)
        outcome = "is incomplete" if self.set_aside else "is complete"
        trouble = f"; {failures} failures are listed in failures.csv" if failures else ""
        log.info("%s %s after %s%s", self.folder, outcome, clock(time.monotonic() - began), trouble)

    def _refresh(self) -> None:
        """Read what the run folder contains now."""
        self.artifacts = Artifacts(self.plan, self.folder, self.artifacts)

    def _note_missing_shards(self) -> None:
        """Set aside tasks without a shard: reports of workers do not count, only shards that this process sees."""
        self.set_aside += [Failure(task, NO_SHARD, "") for task in self._tasks(1)]

    def _work(self) -> None:
        """Execute rounds of tasks until none is left or a round makes no progress, then restart silent units."""
        counts = self._counts()
        if not self._tasks(1):
            log.info("Nothing is missing: %s", "; ".join(stage.line(0.0) for stage in counts))
            self._note_progress(counts)
            if not self._silent_units():
                return
        with open_engine(self.plan.config.engine) as engine:
            engine.stats = self.stats
            engine.await_nodes(interrupts.raise_if_interrupted)
            self._bind(engine)
            while tasks := self._missing_tasks(engine.pool.workers):
                before = len(self.set_aside)
                counts = self._counts()
                self._round(engine, tasks, counts)
                self._note_progress(counts)
                self._refresh()
                again = {task.path for task in self._tasks(1)} & {task.path for task in tasks}
                if again and len(self.set_aside) == before:
                    break  # tasks were reported as done, but there are no shards
            self._restart_silent_units(engine)

    def _missing_tasks(self, workers: int) -> list[Task]:
        """Return the tasks that are left.

        If a file of one is there nevertheless, all are looked for again: the storage may have failed while they were
        read. What is still among the tasks then lacks something, and is replaced.
        """
        tasks = self._tasks(workers)
        if any(Path(task.path).exists() for task in tasks):
            self._refresh()
            tasks = self._tasks(workers)
        return tasks

    def _silent_units(self) -> bool:
        """Return whether there are silent units to restart."""
        return "render" in self.stages and bool(silent_units.silent_units(self.plan, self.artifacts))

    def _restart_silent_units(self, engine: Engine) -> None:
        """Start units that stayed silent once more, from their best dataset examples in a first version of atlas.h5."""
        if not self._silent_units():
            return
        consolidate(self.request, self.plan, self.artifacts, self.set_aside, {})
        with open_atlas(self.folder.path) as atlas:
            tasks = silent_units.restart_tasks(self.plan, self.artifacts, atlas)
        if tasks:
            units, cost = sum(task.size for task in tasks), sum(task.cost for task in tasks)
            log.info("silent units that start once more, from their best dataset examples: %d", units)
            self._round(engine, tasks, [Stage("render", "silent units", units, 0, cost)])
        self._refresh()
        self._note_missing_restarts(tasks)

    def _note_missing_restarts(self, tasks: Sequence[RenderTask]) -> None:
        """Set aside restarts without a shard."""
        noted = {failure.task.path for failure in self.set_aside}
        missing = [task for task in tasks if task.path not in noted and not Path(task.path).is_file()]
        self.set_aside += [Failure(task, NO_SHARD, "") for task in missing]

    def _bind(self, engine: Engine) -> None:
        """Let the plan follow the workers that there are, not those that it assumed: nodes of a cluster may have GPUs.

        Device and precision are part of the identity of results, and tasks are cut by the size and number of workers.
        """
        device = engine.pool.device
        self.plan = dataclasses.replace(self.plan, pool=engine.pool)
        if device_kind(device) != device_kind(self.plan.setup.device):
            log.info("workers run on %s, not on %s as planned", device, self.plan.setup.device)
            self.plan = dataclasses.replace(self.plan, setup=execution.on_device(self.plan.setup, device))
            self._refresh()

    def _note_progress(self, counts: Sequence[Stage]) -> None:
        """Keep the counts of stages that were worked on."""
        worked = {stage.name: stage for stage in counts if stage.fresh or stage.name not in self.progress}
        self.progress |= worked

    def _round(self, engine: Engine, tasks: Sequence[Task], counts: list[Stage]) -> None:
        """Execute tasks and show the progress."""
        tasks = [dataclasses.replace(task, replaces=Path(task.path).exists()) for task in tasks]
        config = self.request.config.engine
        workers = min(engine.pool.workers, len(tasks))
        after = self.plan.finish_seconds if "site" in self.stages else 0.0
        save = self.folder.write_status
        with ProgressReporter(counts, workers, save, config.progress_seconds, self.stats, after) as reporter:

            def on_result(task: Task, result: Done | Failure) -> None:
                if isinstance(result, Failure):
                    self.set_aside.append(result)
                if task.stage in reporter.stages:
                    seconds = result.seconds if isinstance(result, Done) else 0.0
                    reporter.add(task.stage, task.size, task.cost, seconds, failed=isinstance(result, Failure))

            def on_idle() -> None:
                interrupts.raise_if_interrupted()
                reporter.beat()

            engine.execute(tasks, self.plan.setup, on_result, on_idle)

    def _counts(self) -> list[Stage]:
        """Return the progress of each stage so far."""
        plan, artifacts = self.plan, self.artifacts
        counts: list[Stage] = []
        if "examples" in self.stages:
            state = artifacts.dataset_pass
            missing = sum(end - start for start, end in gaps(state.swept_ranges, artifacts.total))
            each = plan.examples_seconds / artifacts.total
            counts.append(Stage("examples", "images", artifacts.total, artifacts.total - missing, each * missing))
            if state.covered:
                cost = each * (state.to_localize - state.localized)
                counts.append(Stage("localize", "images", state.to_localize, state.localized, cost))
            effects = artifacts.effects
            if effects.total:
                cost = effects.image_seconds * effects.missing
                counts.append(Stage("effects", "images", effects.total, effects.total - effects.missing, cost))
            if effects.connected:
                left = effects.connected_missing
                cost = effects.connection_seconds * left
                counts.append(Stage("connections", "images", effects.connected, effects.connected - left, cost))
            if effects.relevant and not effects.missing:
                left = effects.relevant_missing
                cost = effects.relevance_seconds * left
                counts.append(Stage("relevance", "images", effects.relevant, effects.relevant - left, cost))
            for name, state in (("samples", artifacts.activation_atlas), ("responses", artifacts.facets)):
                if state.total:
                    cost = state.image_seconds * state.missing
                    counts.append(Stage(name, "images", state.total, state.total - state.missing, cost))
        if "render" in self.stages:
            missing_channels = {row: len(set(row.channels) - artifacts.channels(row)) for row in plan.rows}
            cost = sum(row.cost(count) for row, count in missing_channels.items())
            done = plan.work - sum(missing_channels.values())
            counts.append(Stage("render", "units", plan.work, done, cost))
            for name, state in (("cells", artifacts.activation_atlas), ("facets", artifacts.facets)):
                if state.total and not state.missing:
                    total, left = sum(state.counts.values()), sum(state.missing_items.values())
                    counts.append(Stage(name, name, total, total - left, state.missing_seconds))
        return counts

    def _tasks(self, workers: int) -> list[Task]:
        """Return the tasks that can be done now, without those that were set aside.

        The rounds of the dataset pass need the complete round before, and visualizations come with its last round.
        """
        plan, artifacts = self.plan, self.artifacts
        excluded = [failure.task for failure in self.set_aside]
        tasks: list[Task] = []
        if "examples" in self.stages:
            tasks += artifacts.dataset_pass.tasks(workers, excluded)
            tasks += artifacts.effects.tasks(workers, excluded)
            tasks += artifacts.activation_atlas.image_tasks(workers, excluded)
            tasks += artifacts.facets.image_tasks(workers, excluded)
        if "render" in self.stages and not any(isinstance(task, RangesTask | SweepTask) for task in tasks):
            done = {row: artifacts.channels(row) for row in plan.rows}
            rows = {(row.layer.name, row.preset): row for row in plan.rows}
            for task in excluded:
                if isinstance(task, RenderTask):
                    done[rows[task.layer, task.preset]] |= set(task.channels)
            missing = plan.render_tasks(plan.config.folder.absolute() / "shards", done, workers)
            tasks += self._with_dataset_results(missing) if plan.setup.begins else missing
            tasks += artifacts.activation_atlas.item_tasks(workers, excluded)
            tasks += artifacts.facets.item_tasks(workers, excluded)
        return tasks

    def _with_dataset_results(self, tasks: list[RenderTask]) -> list[RenderTask]:
        """Return the tasks with what their visualizations need of the dataset pass, from atlas.h5."""
        presets = {preset.name: preset for preset in self.plan.config.rendered_presets if preset.needs_dataset_pass}
        if not any(task.preset in presets for task in tasks):
            return tasks
        with open_atlas(self.plan.config.folder) as atlas:
            return [
                dataclasses.replace(
                    task,
                    starts=best_examples.initial_images_of(atlas, presets[task.preset], task.layer, task.channels),
                    layer_mean=best_examples.layer_mean_of(atlas, presets[task.preset], task.layer),
                )
                if task.preset in presets
                else task
                for task in tasks
            ]
