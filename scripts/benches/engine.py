"""Measure the overhead of the engine and how it scales.

scripts/bench engine overhead [units=50000] [workers=8]    a renderer that does nothing: units/s, driver memory
scripts/bench engine scaling [plan.csv]                     simulated pools of up to 512 workers, times of a real plan
scripts/bench engine simulate [plan.csv] [--units 20000] [--workers 64] [--lost 0.001]
                                                            the real driver loop on stub workers in this process, whose
                                                            tasks take no time: units/s and memory of the driver
scripts/bench engine threads                                2 workers × 1 thread against 1 worker × 2 threads
"""

import argparse
import dataclasses
import heapq
import logging
import random
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from pipeline.cli.main import main
from pipeline.config.schema import CPU_BATCH, EngineConfig
from pipeline.engine import handshake
from pipeline.engine.base import Failure, ordered
from pipeline.engine.factory import open_engine
from pipeline.engine.progress import ProgressReporter, Stage
from pipeline.engine.ray_engine import RayEngine
from pipeline.engine.tasks import Done, RenderTask
from pipeline.planning.folder import RunFolder
from pipeline.planning.plan import SHARE, portions


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclasses.dataclass(frozen=True)
class Setup:
    """The attributes of a worker's setup that the engine itself uses."""

    threads: int = 1
    device: str = "cpu"


class Nothing:
    """A worker that finishes every task at once without rendering."""

    def __init__(self, setup: Any, stop: Any = None, weights: Any = None) -> None:
        pass

    def do(self, task: RenderTask, fits: Any = None, files: Any = None) -> Done:
        return Done(task.path, 0.0)


def overhead(units: int, workers: int) -> dict[str, float]:
    """Run one task per unit through the real driver loop, the progress reporter and status.json.

    Memory is that of the driver (RSS), at a tenth of the units and at the end.
    """

    config = EngineConfig(workers=workers, cpus_per_worker=0.25)
    tasks = [RenderTask(f"{i}.h5", "d", 1.0, "layer", (i,), (8, 8), "distill") for i in range(units)]
    memory: list[int] = []
    process = psutil.Process()
    with tempfile.TemporaryDirectory() as root, open_engine(config, Nothing) as engine:
        folder, stage = RunFolder(Path(root)), Stage("render", "units", units, 0, float(units))
        began = time.monotonic()
        with ProgressReporter([stage], workers, folder.write_status, 60.0, engine.stats) as board:

            def finished(task: RenderTask, result: Any) -> None:
                board.add("render", 1, 1.0, 1e-3)
                if stage.done % max(1, units // 10) == 0:
                    memory.append(process.memory_info().rss)

            engine.execute(tasks, Setup(), finished, board.beat)  # type: ignore[arg-type]
        seconds = time.monotonic() - began
    found = {
        "units": stage.done,
        "workers": engine.pool.workers,
        "units_per_second": round(units / seconds, 1),
        "memory_first_mb": round(memory[0] / 1e6, 1),
        "memory_last_mb": round(memory[-1] / 1e6, 1),
    }
    say(str(found))
    return found


def simulated(costs: list[float], workers: int, spread: float, seed: int = 0) -> float:
    """Return the efficiency (work done ÷ time paid for) of a worker pool that starts the longest tasks first.

    The actual time of a task is its estimate times a log-normal factor with standard deviation `spread`.
    """
    draw = random.Random(seed)
    free = [0.0] * workers
    total = 0.0
    for cost in costs:
        real = cost * draw.lognormvariate(0.0, spread)
        total += real
        heapq.heappush(free, heapq.heappop(free) + real)
    return total / (workers * max(free))


def rows_of(plan: Path) -> list[tuple[float, int]]:
    """Return (seconds of one unit, units) of the rows of a plan.csv, whose seconds must be those of one worker."""
    table = pd.read_csv(plan, keep_default_na=False)
    rows = [
        (float(seconds) / int(units), int(units))
        for layer, units, seconds in zip(table["layer"], table["units"], table["seconds"], strict=True)
        if layer and float(seconds) > 0
    ]
    return sorted(rows, reverse=True)


class _Lost(Exception):
    """The error of a stub worker that is gone."""


class StubRay:
    """The functions of the module `ray` that the engine uses, with stub workers in this process and a clock of its own.

    Args:
        workers: Number of CPUs of the only node, and so of workers.
        lost: Share of the tasks that end in the loss of their worker.
        spread: Standard deviation of the logarithm of a task's time, as a multiple of its estimate.
    """

    def __init__(self, workers: int, lost: float, spread: float) -> None:
        self.workers, self.lost, self.spread = workers, lost, spread
        self.draw = random.Random(0)
        self.clock = 0.0
        self.started = 0
        self.due: list[tuple[float, int]] = []  # (end, reference) of the calls in progress
        self.results: dict[int, Any] = {}
        self.calls = 0
        self.versions = handshake.versions("pipeline")
        self.exceptions = types.SimpleNamespace(RayError=_Lost, RayTaskError=ZeroDivisionError)
        self.cloudpickle = types.SimpleNamespace(register_pickle_by_value=lambda module: None)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": "stub", "Alive": True, "Resources": {"CPU": float(self.workers)}}]

    def put(self, value: Any) -> Any:
        return value

    def kill(self, actor: Any) -> None:
        pass

    def remote(self, **_: Any) -> Any:
        return lambda actor_class: types.SimpleNamespace(remote=self.start)

    def start(self, *_: Any) -> Any:
        self.started += 1
        hello = types.SimpleNamespace(
            remote=lambda _: self.call(1.0, {**self.versions, "name": f"stub:{self.started}"})
        )
        return types.SimpleNamespace(hello=hello, do=types.SimpleNamespace(remote=self.do))

    def do(self, task: RenderTask, *_: Any) -> int:
        seconds = task.cost * self.draw.lognormvariate(0.0, self.spread)
        failed = self.draw.random() < self.lost
        return self.call(seconds, _Lost("The worker died unexpectedly.") if failed else Done(task.path, seconds))

    def call(self, seconds: float, result: Any) -> int:
        self.calls += 1
        self.results[self.calls] = result
        heapq.heappush(self.due, (self.clock + seconds, self.calls))
        return self.calls

    def wait(self, references: list[int], num_returns: int = 1, timeout: float = 0.0) -> tuple[list[int], list[int]]:
        self.clock, first = heapq.heappop(self.due)
        return [first], []

    def get(self, reference: int) -> Any:
        result = self.results.pop(reference)
        if isinstance(result, Exception):
            raise result
        return result


def simulate(plan: Path, units: int, workers: int, lost: float, spread: float) -> dict[str, float]:
    """Let the driver loop distribute the tasks of a plan, repeated to `units` units, among stub workers.

    Progress and status.json are those of a run. Memory is that of the driver (RSS): when the tasks are known, at a
    tenth of the units, and at the end.
    """
    rows = rows_of(plan)
    config = EngineConfig(workers=workers, cpus_per_worker=1.0, max_failures=1_000_000)
    whole, count = sum(each * n for each, n in rows), sum(n for _, n in rows)
    repeats = -(-units // count)
    tasks, left, unassigned = [], whole * repeats, units
    for number in range(repeats):
        for layer, (each, channels) in enumerate(rows):
            wanted, channel = min(channels, unassigned), 0
            unassigned -= wanted
            for size in portions(wanted, each, left, workers, config.task_seconds, CPU_BATCH, 1):
                part = tuple(range(channel, channel + size))
                tasks.append(
                    RenderTask(f"{number}/{layer}/{channel}.h5", "d", each * size, str(layer), part, (8, 8), "p")
                )
                channel, left = channel + size, left - each * size
    ray, process = StubRay(workers, lost, spread), psutil.Process()
    memory, work = [process.memory_info().rss], sum(task.cost for task in tasks)
    with tempfile.TemporaryDirectory() as root:
        folder, stage = RunFolder(Path(root)), Stage("render", "units", units, 0, work)
        engine = RayEngine(ray, config, Nothing)
        with ProgressReporter([stage], workers, folder.write_status, 60.0, engine.stats) as board:
            began = time.monotonic()

            def finished(task: RenderTask, result: Any) -> None:
                board.add("render", task.size, task.cost, getattr(result, "seconds", 0.0), isinstance(result, Failure))
                if len(memory) == 1 and stage.done >= units // 10:
                    memory.append(process.memory_info().rss)

            engine.execute(tasks, Setup(), finished, board.beat)  # type: ignore[arg-type]
            seconds = time.monotonic() - began
        engine.close()
    memory.append(process.memory_info().rss)
    figures = {
        "units": stage.done,
        "tasks": len(tasks),
        "workers": workers,
        "workers_started": ray.started,
        "units_per_second": round(units / seconds, 1),
        "tasks_per_second": round(len(tasks) / seconds, 1),
        "memory_mb": [round(m / 1e6, 1) for m in memory],
        "simulated_hours": round(ray.clock / 3600, 2),
        "efficiency": round(work / (workers * ray.clock), 4),
    }
    say(str(figures))
    return figures


def scaling(plan: Path, spread: float) -> list[dict[str, float]]:
    """Print the predicted efficiency for the rows of a plan.csv, whose seconds must be those of one worker."""
    rows = rows_of(plan)
    whole = sum(each * count for each, count in rows)
    say(
        f"{plan}: {sum(n for _, n in rows):,} units, {whole / 3600:.1f} hours of one worker; spread of times {spread:g}"
    )
    found = []
    for workers in (1, 2, 8, 32, 64, 128, 256, 512):
        left, costs = whole, []
        for each, count in rows:
            for size in portions(count, each, left, workers, EngineConfig().task_seconds, CPU_BATCH, 1):
                costs.append(each * size)
                left -= each * size
        tasks = ordered(
            [RenderTask(str(i), "", cost, "layer", (i,), (8, 8), "distill") for i, cost in enumerate(costs)]
        )
        efficiency = simulated([task.cost for task in tasks], workers, spread)
        found.append({"workers": workers, "tasks": len(tasks), "efficiency": round(efficiency, 4)})
        hours = whole / 3600 / workers / efficiency
        say(f"  {workers:4d} workers: {len(tasks):6d} tasks, efficiency {efficiency:6.1%}, {hours:7.2f} h")
    say(f"  (a task is at most 1/{SHARE} of the work left for each worker, and {EngineConfig().task_seconds:g} s)")
    return found


def threads(steps: int) -> dict[str, float]:
    """Print units per second with 2 workers × 1 thread and 1 worker × 2 threads, alternating, twice."""
    found: dict[str, list[float]] = {"2x1": [], "1x2": []}
    with tempfile.TemporaryDirectory() as root:
        for turn in range(2):
            for name, workers, cpus in (("2x1", 2, 1), ("1x2", 1, 2)):
                run = f"{name}-{turn}"
                arguments = [
                    "render", f"run.root={root}", f"run.name={run}", f"render.steps={steps}",
                    "layers.channels='0:8'", f"engine.workers={workers}", f"engine.cpus_per_worker={cpus}",
                ]  # fmt: skip
                assert main(arguments) == 0
                stage = RunFolder(Path(root, run)).read_status()["report"]["stages"]["render"]
                found[name].append(stage["per_second"])
                say(f"{name}: {stage['per_second']} units/s")
    best = {name: max(values) for name, values in found.items()}
    ratio = best["2x1"] / best["1x2"]
    say(f"2 workers × 1 thread {best['2x1']}, 1 worker × 2 threads {best['1x2']} units/s: {ratio:.2f} ×")
    return best


if __name__ == "__main__":
    logging.getLogger("pipeline").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb")
    one = verbs.add_parser("overhead")
    one.add_argument("--units", type=int, default=50_000)
    one.add_argument("--workers", type=int, default=8)
    two = verbs.add_parser("scaling")
    two.add_argument("plan", nargs="?", type=Path)
    two.add_argument("--spread", type=float, default=0.3)
    four = verbs.add_parser("simulate")
    four.add_argument("plan", nargs="?", type=Path)
    four.add_argument("--units", type=int, default=20_000)
    four.add_argument("--workers", type=int, default=64)
    four.add_argument("--lost", type=float, default=0.001)
    four.add_argument("--spread", type=float, default=0.3)
    three = verbs.add_parser("threads")
    three.add_argument("--steps", type=int, default=64)
    given = parser.parse_args()
    if given.verb in (None, "overhead"):
        overhead(getattr(given, "units", 50_000), getattr(given, "workers", 8))
    if given.verb in (None, "scaling", "simulate"):
        plan = getattr(given, "plan", None)
        if plan is None:
            root = tempfile.mkdtemp()
            # One worker, so that the seconds of plan.csv are those of a worker.
            main(["plan", "experiment=overnight", f"run.root={root}", "run.name=plan", "engine.workers=1"])
            plan = Path(root, "plan", "plan.csv")
        if given.verb == "simulate":
            logging.getLogger("pipeline").setLevel(logging.ERROR)  # each lost worker is a warning
            simulate(plan, given.units, given.workers, given.lost, given.spread)
        else:
            scaling(plan, getattr(given, "spread", 0.3))
    if given.verb in (None, "threads"):
        threads(getattr(given, "steps", 64))
