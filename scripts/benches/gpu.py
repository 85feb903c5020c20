"""Measure on one GPU everything that this project states or hopes about GPUs, in one call of less than ten minutes.

    python scripts/benches/gpu.py prepare build/gpu      # where there is a package index: makes what must be carried
    python3 scripts/benches/gpu.py --carried build/gpu   # on the GPU machine, in the working tree

                [--out FOLDER] [--device cuda|cpu] [--minutes 9.3] [--blocks a,b] [--references FILE]

Nothing is installed: wheels of the carried folder are unpacked into a temporary one. Each block has its share of the
time and appends its rows at once to gpu.jsonl in the folder of the results (that of the variable OUT, or runs/gpu).
Blocks run in one process, which is replaced if a block kills it, loses the GPU or does not end. The table and the
goals are printed last. With `--device cpu` every block runs its own code in tiny sizes, in a minute or two: its times
mean nothing.

ResNet-50 has random weights, with batch-norm statistics of one forward pass on seeded noise; EfficientNet-Lite0 its
own.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclasses.dataclass(frozen=True)
class Block:
    """A block: its name, the module and function that run it, and its seconds in a call of 9.3 minutes."""

    name: str
    place: str
    seconds: float


BLOCKS = (
    Block("environment", "ceilings:run", 25),
    Block("correctness", "correctness:run", 70),
    Block("layers", "speed:run", 150),
    Block("batches", "speed:batches", 35),
    Block("levers", "levers:run", 55),
    Block("whole", "whole:run", 30),
    Block("lucent", "lucent:run", 50),
    Block("dataset", "dataset:run", 45),
    Block("processes", "processes:run", 50),
    Block("silent", "silent:run", 20),
    Block("memory", "memory:run", 18),
    Block("tests", "tests:run", 30),
)
# Seconds at the end for the table.
RESERVE = 6.0
# Exit status of the process of the blocks after a block that left the device unusable.
LOST = 70
# A dry run on a CPU has as many times the minutes, so that slow machines execute all of it.
PATIENCE = 8


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--carried", type=Path, help="folder that `gpu.py prepare` made")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "runs/gpu"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=9.3)
    parser.add_argument("--blocks", default="", help=f"of {', '.join(block.name for block in BLOCKS)}; by default all")
    parser.add_argument("--references", type=Path, help="by default that of the carried folder")
    parser.add_argument("--member", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def fits(wheel: str) -> bool:
    """Return whether a wheel is for this version of Python, by its file name."""
    tags = wheel.removesuffix(".whl").split("-")[-3].split(".")
    return bool({"py3", f"cp{sys.version_info.major}{sys.version_info.minor}"} & set(tags))


def unpack(carried: Path | None, folder: Path) -> list[Path]:
    """Unpack the carried wheels; return the folders that Python must search, the first first."""
    site = folder / "site"
    for wheel in sorted((carried / "wheels").glob("*.whl")) if carried else ():
        if not fits(wheel.name):
            print(f"left out, for another Python: {wheel.name}")
            continue
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    stubs = [carried.resolve() / "stubs"] if carried and not importlib.util.find_spec("IPython") else []
    return [ROOT, site, *stubs]


# ------------------------------------------------------------------------ in the process of the blocks


def schedule(blocks: Sequence[Block], begin: float, end: float) -> dict[str, tuple[float, float]]:
    """Return the seconds of each block, and the time until which it may use what blocks before it left over."""
    scale = max(0.0, end - RESERVE - begin) / sum(block.seconds for block in blocks)
    until, found = begin, {}
    for block in blocks:
        until += scale * block.seconds
        found[block.name] = (scale * block.seconds, until)
    return found


def run_blocks(member: dict[str, Any]) -> int:
    """Run blocks one after the other; each may fail without harm to the others."""
    from gpu_blocks.bench import Bench

    carried, references = (Path(member[key]) if member[key] else None for key in ("carried", "references"))
    bench = Bench(member["device"], Path(member["out"]), carried, references, small=member["device"] == "cpu")
    for block in (block for block in BLOCKS if block.name in member["blocks"]):
        seconds, until = member["schedule"][block.name]
        bench.block, now = block.name, time.time()
        bench.deadline = min(member["end"] - RESERVE, max(until, now + seconds))
        if bench.left() < min(seconds / 4, 5):
            bench.row("skipped", reason="the time of the call is over")
            continue
        kill = min(member["end"], bench.deadline + max(15, seconds / 4))
        # Times as integers: rows round other numbers to five digits, and these have ten.
        bench.row("started", deadline=math.ceil(bench.deadline), kill=math.ceil(kill))
        module, function = block.place.split(":")
        try:
            getattr(importlib.import_module(f"gpu_blocks.{module}"), function)(bench)
        except Exception as error:
            traceback.print_exc()
            bench.row("failed", seconds=time.time() - now, reason=f"{type(error).__name__}: {error}"[:300])
        else:
            bench.row("done", seconds=time.time() - now)
        try:
            bench.clean()
        except RuntimeError:
            traceback.print_exc()
            return LOST
    return 0


# -------------------------------------------------------------------------------- in the first process


def supervise(command: Sequence[str], member: dict[str, Any], environment: dict[str, str]) -> None:
    """Run the blocks in another process, and in a new one those that are left if it ends before."""
    from gpu_blocks.rows import append, rows_of

    out, waiting, printed = Path(member["out"]), list(member["blocks"]), 0

    def show() -> list[dict[str, Any]]:
        nonlocal printed
        rows = rows_of(out)
        for row in rows[printed:]:
            print(" ".join(f"{k}={v}" for k, v in row.items() if k not in ("deadline", "kill"))[:220], flush=True)
        printed = len(rows)
        return rows

    while waiting:
        asked = json.dumps({**member, "blocks": waiting})
        with (out / "gpu.log").open("a") as log:
            process = subprocess.Popen(
                [*command, "--member", asked], env=environment, stdout=log, stderr=log, start_new_session=True
            )
        block, reason = waiting[0], ""
        while process.poll() is None and not reason:
            time.sleep(0.3)
            rows = show()
            started = [row for row in rows if row["what"] == "started"]
            block, kill = (started[-1]["block"], started[-1]["kill"]) if started else (waiting[0], float("inf"))
            ended = any(row["block"] == block and row["what"] in ("done", "failed") for row in rows)
            if time.time() > member["end"] or (time.time() > kill and not ended):
                reason = "it did not end in its time"
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        rows = show()
        states = {row["block"]: row["what"] for row in rows if row["what"] in ("done", "failed", "skipped", "killed")}
        waiting = [name for name in waiting if name not in states]
        if not waiting:
            break
        if code == 0 or time.time() > member["end"]:
            for name in waiting:
                what = "killed" if name == block and reason else "skipped"
                append(out, {"block": name, "what": what, "reason": reason or "the process ended before"})
            break
        if code != LOST:
            last = (out / "gpu.log").read_text().strip().splitlines()[-1:]
            why = reason or f"its process ended with {code}: {' '.join(last)[:200]}"
            lost = block if block in waiting else waiting[0]
            append(out, {"block": lost, "what": "killed", "reason": why})
            waiting.remove(lost)
    show()


def main() -> int:
    begin = time.time()
    if sys.argv[1:2] == ["prepare"]:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before PyTorch is loaded
        sys.path[:0] = [str(ROOT), str(HERE)]
        from gpu_blocks import prepare

        return prepare.main(sys.argv[2:])
    options = arguments()
    if options.member:
        return run_blocks(json.loads(options.member))
    wanted = [name for name in options.blocks.split(",") if name] or [block.name for block in BLOCKS]
    if unknown := set(wanted) - {block.name for block in BLOCKS}:
        print(f"no such block: {', '.join(sorted(unknown))}; of {', '.join(block.name for block in BLOCKS)}")
        return 2
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("gpu.jsonl", "gpu.log", "gpu.txt"):
        (out / name).unlink(missing_ok=True)
    references = options.references or (options.carried / "references.npz" if options.carried else None)
    end = begin + 60 * options.minutes * (PATIENCE if options.device == "cpu" else 1)
    blocks = [block for block in BLOCKS if block.name in wanted]
    member = {
        "device": options.device, "out": str(out), "end": end, "blocks": [block.name for block in blocks],
        "carried": str(options.carried.resolve()) if options.carried else "",
        "references": str(references.resolve()) if references else "", "schedule": schedule(blocks, begin, end),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(path) for path in unpack(options.carried, Path(folder))]
        sys.path[:0] = [str(HERE)]
        before = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, *before]), "PYTHONUNBUFFERED": "1"}
        if options.device == "cpu":
            environment.setdefault("OMP_WAIT_POLICY", "passive")
        supervise([sys.executable, str(HERE / "gpu.py")], member, environment)
    return finish(out, [block.name for block in blocks], options.device)


def finish(out: Path, blocks: Sequence[str], device: str) -> int:
    """Print the table; return 1 if a block failed."""
    from gpu_blocks.report import table
    from gpu_blocks.rows import rows_of

    rows = rows_of(out)
    text = table(rows, blocks, judged=device == "cuda")
    (out / "gpu.txt").write_text(text + "\n")
    print("\n" + text, flush=True)
    return int(any(row["what"] in ("failed", "killed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
