#!/usr/bin/env python3
"""Measure the time and the accuracy of `atlas plan`.

scripts/bench plans [name …]                   seconds of `atlas plan` on each architecture, one after the other
scripts/bench plans small [options]            12 small visualizations: seconds planned, seconds taken, ratio
scripts/bench plans parts                      the parts of such a run, as multiples of a process's start

`small` runs each of its networks inline and on Ray, without other processes and with two that each keep a core busy. It
measures from the last line of the plan to the line that reports the complete run, and prints medians over --repeat
runs. `parts` measures the constants of pipeline/planning/overheads.py. Both start a process for each run.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import pandas as pd

NAMES = {
    "torchvision": (
        "alexnet", "vgg16", "googlenet", "inception_v3", "resnet18", "resnet50", "densenet121", "mobilenet_v2",
        "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "regnet_y_400mf", "vit_b_16", "swin_t",
    ),
    "timm": ("deit_tiny_distilled_patch16_224",),
}  # fmt: skip

SMALL = {
    "efficientnet_lite0": ["model=efficientnet_lite0"],
    "test_efficientnet": ["model=timm", "model.name=test_efficientnet", "model.weights=null", "model.input_size=64"],
    "resnet18": ["model=resnet18", "model.weights=null"],
}
TWELVE = ["layers=tour", "layers.count=4", "layers.channels=spread:3", "render.steps=16", "data.limit=16"]

HERE = Path(__file__).resolve().parents[2]
ATLAS = [str(HERE / "scripts" / "atlas")]


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Run `count` processes that each keep a core busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def planned_and_taken(overrides: Sequence[str]) -> tuple[float, float, str]:
    """Return the planned and the measured seconds of a run, and the plan's last line."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    told, began, ended = "", 0.0, 0.0
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as root:
        command = [*ATLAS, "run", f"run.root={root}", "run.name=small", *overrides]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as run:
            assert run.stdout is not None
            for line in run.stdout:
                lines.append(line)
                if line.startswith("to do:"):
                    told, began = line.strip(), time.perf_counter()
                if "is complete after" in line:
                    ended = time.perf_counter()
        if not (began and ended):
            raise SystemExit(f"{' '.join(command)} was not complete:\n{''.join(lines)}")
        table = pd.read_csv(Path(root, "small", "plan.csv"))
    return float(table["seconds"][table["kind"] == "total"].item()), ended - began, told


def small(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--networks", default=",".join(SMALL))
    parser.add_argument("--engines", default="inline,ray")
    parser.add_argument("--busy", default="0,2")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(arguments)
    cases = [
        (network, engine, int(count), [])
        for network in options.networks.split(",")
        for engine in options.engines.split(",")
        for count in options.busy.split(",")
    ]
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {case[:3]: [] for case in cases}
    # Round by round, so that a disturbance does not affect all repetitions of one case.
    for _ in range(options.repeat):
        for network, engine, count, _ in cases:
            with busy(count):
                overrides = [*SMALL[network], *TWELVE, f"engine={engine}", *options.overrides]
                planned, taken, told = planned_and_taken(overrides)
            found[network, engine, count].append((planned, taken))
            about = re.search(r"about (.*) with", told)
            load = os.getloadavg()[0]
            print(
                f"{network}, {engine}, {count} others: told {about[1] if about else told!r}, took {taken:.1f} s, "
                f"ratio {planned / taken:.2f}, load {load:.1f}", flush=True,
            )  # fmt: skip
    print("\n| network | engine | other processes | planned, s | took, s | planned ÷ took | least | most |")
    print("|---|---|---|---|---|---|---|---|")
    for (network, engine, count), runs in found.items():
        ratios = [planned / taken for planned, taken in runs]
        planned, taken = (median(column) for column in zip(*runs, strict=True))
        print(
            f"| {network} | {engine} | {count} | {planned:.1f} | {taken:.1f} | {median(ratios):.2f} | "
            f"{min(ratios):.2f} | {max(ratios):.2f} |"
        )


def parts() -> None:
    """Measure the stages of a run, in a separate process for each engine."""
    for engine in ("inline", "ray"):
        with tempfile.TemporaryDirectory() as root:
            own = [*SMALL["efficientnet_lite0"], *TWELVE, f"engine={engine}", f"run.root={root}", "run.name=parts"]
            environment = os.environ | {"PYTHONPATH": str(HERE)}
            subprocess.run([sys.executable, __file__, "timed", *own], env=environment, stdout=subprocess.DEVNULL)


def timed(overrides: Sequence[str]) -> None:
    """Do one run in this process and print the time of each stage to stderr."""
    from pipeline.cli.main import main
    from pipeline.engine import connection, inline, ray_engine
    from pipeline.planning import overheads
    from pipeline.runs import runner

    laps: dict[str, list[float]] = {}
    start = 1.0

    def noting(module: object, name: str, what: str) -> None:
        function = getattr(module, name)

        def call(*arguments: object, **named: object) -> object:
            lap = overheads.Stopwatch()
            with lap:
                result = function(*arguments, **named)
            laps.setdefault(what, []).append(lap.seconds)
            return result

        setattr(module, name, call)

    def started() -> overheads.Span:
        nonlocal start
        span = own()
        start = span.expected
        return span

    own = overheads.process_start
    from pipeline.planning import planner

    planner.process_start = started
    connected = connection.connected

    @contextlib.contextmanager
    def connecting(config: object) -> Iterator[object]:
        began = time.perf_counter()
        with connected(config) as ray:  # type: ignore[arg-type]
            laps["CONNECT"] = [time.perf_counter() - began]
            yield ray
            began = time.perf_counter()
        laps["CLOSE"] = [time.perf_counter() - began]

    connection.connected = connecting  # type: ignore[assignment]
    execute = ray_engine.RayEngine.execute

    def executing(self: ray_engine.RayEngine, tasks: object, setup: object, finished: object, idle: object) -> None:
        began, busy_before, told = time.perf_counter(), len(self.stats), []

        def first(task: object, result: object) -> None:
            if not told:
                told.append(time.perf_counter() - began - getattr(result, "seconds", 0.0))
            finished(task, result)  # type: ignore[operator]

        execute(self, tasks, setup, first, idle)  # type: ignore[arg-type]
        assert len(self.stats) > busy_before
        laps.setdefault("WORKER", []).extend(told)

    ray_engine.RayEngine.execute = executing  # type: ignore[assignment]
    noting(runner, "consolidate", "FINISH (atlas.h5)")
    noting(runner, "refresh_site", "FINISH (site)")
    noting(inline.Worker, "_ranges", "ranges (inline)")
    main(["run", *overrides])
    sys.stderr.write(f"start of a process: {start:.1f} s\n")
    for what, seconds in laps.items():
        each = median(seconds)
        sys.stderr.write(f"{what}: {len(seconds)} × {each:.2f} s, {each / start:.2f} of a start\n")


def main() -> None:
    wanted = sys.argv[1:]
    if wanted[:1] == ["small"]:
        return small(wanted[1:])
    if wanted == ["parts"]:
        return parts()
    if wanted[:1] == ["timed"]:
        return timed(wanted[1:])
    with tempfile.TemporaryDirectory() as root:
        for source, names in NAMES.items():
            for name in names:
                if wanted and name not in wanted:
                    continue
                model = [f"model={source}", f"model.name={name}", "model.weights=null"]
                began = time.perf_counter()
                done = subprocess.run(
                    [*ATLAS, "plan", *model, "layers=convs", f"run.root={root}"], capture_output=True, text=True
                )
                seconds = time.perf_counter() - began
                lines = [line for line in done.stdout.splitlines() if line.startswith("conv:")] or [done.stderr.strip()]
                print(f"{name:32} {seconds:6.1f} s   {lines[-1]}", flush=True)
    return None


if __name__ == "__main__":
    main()
