"""Test whether the optimization loop became slower: this working tree against another commit, alternating.

scripts/bench paired COMMIT [--layers blocks.3.1.conv_pw,blocks.5.3.conv_pwl] [--steps 40] [--rounds 12]

Both render the same 16 channels of each layer with the default preset, one thread, each in its own process. They
alternate, so that other load on the machine slows both. Processor times are compared by the median of the ratios of all
rounds. The other commit is checked out beside this one and removed afterwards.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parents[2]


def rendering(layer_name: str, steps: int) -> Callable[[], object]:
    """Return a function that does the timed work, with the code of the working directory."""
    sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "scripts" / "benches")]
    import render as bench
    import torch

    from pipeline.acceleration import batchnorm_folding, cpu_lowering
    from pipeline.kernels import allocator
    from pipeline.models import loading
    from pipeline.visualization import loop

    allocator.retain_freed_memory()
    torch.set_num_threads(1)
    config = bench.config_of("distill", "efficientnet_lite0")
    model = loading.load_model(config.model)
    layer = next(la for la in bench.list_layers(model, config.layers) if la.name == layer_name)
    size = bench.choose_canvas_sizes(model, [layer], config.render)[layer.name]
    try:
        from pipeline.acceleration.precision import precision_of
    except ImportError:  # for commits before it was a module of its own
        precision_of = cpu_lowering.precision_of
    precision = precision_of(config.engine.precision, "cpu")
    found: Any
    pairs = batchnorm_folding.foldable_pairs(model)
    if hasattr(bench, "verified_variants"):
        found = bench.verified_variants(model, pairs, [layer], precision, size)
        folded, lowered = found.folded, found.steps
    else:  # for commits before variants were verified
        folded = bench.fold(model, pairs, [layer])
        found = bench.twins(folded, pairs, precision)
        lowered = found.lowered
    units = [(channel % layer.channels, channel // layer.channels) for channel in range(16)]
    preset = dataclasses.replace(config.render, steps=steps, attempts=1)
    if hasattr(preset, "for_layer"):
        preset = preset.for_layer(layer)
    render: Any = loop.render
    if hasattr(loop, "RenderJob"):
        job = loop.RenderJob(folded, layer, preset, 0, size, step_model=lowered, exact_model=found.exact)
        return lambda: render(job, units)
    # Commits in which `render` had these parameters itself.
    return lambda: render(folded, layer, units, preset, 0, size, lowered=lowered, exact=found.exact)


def serve(layer: str, steps: int) -> None:
    """Do the work once for each line read from standard input, and print the processor seconds that it took."""
    work = rendering(layer, steps)
    work()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.process_time()
        work()
        print(time.process_time() - began, flush=True)


def started(tree: Path, layer: str, steps: int) -> "subprocess.Popen[str]":
    """Start the process that renders with the code of `tree`, and return it when it is ready."""
    own = tree / "scripts" / "benches" / "paired.py"
    script = own if own.exists() else Path(__file__)
    command = [sys.executable, str(script), "--serve", layer, "--steps", str(steps)]
    process = subprocess.Popen(command, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if not any(line.startswith("ready") for line in iter(process.stdout.readline, "")):
        raise SystemExit(f"{tree}: the bench ended, see above")
    return process


def asked(process: "subprocess.Popen[str]") -> float:
    """Request one rendering and return its processor seconds."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def compared(trees: tuple[Path, Path], layer: str, steps: int, rounds: int) -> None:
    """Print one row: the medians of both trees and of their ratio."""
    processes = [started(tree, layer, steps) for tree in trees]
    times: list[tuple[float, float]] = []
    try:
        for count in range(rounds):
            order = (0, 1) if count % 2 else (1, 0)
            found = {k: asked(processes[k]) for k in order}
            times.append((found[0], found[1]))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    before, now = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = sorted(b / a for a, b in times)
    print(
        f"| {layer} | {before:.2f} | {now:.2f} | {statistics.median(ratios):.3f} | "
        f"{ratios[len(ratios) // 4]:.3f} to {ratios[-1 - len(ratios) // 4]:.3f} |",
        flush=True,
    )


def main() -> None:
    """Run the comparison, or serve one side of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default="HEAD")
    parser.add_argument("--layers", default="blocks.3.1.conv_pw,blocks.5.3.conv_pwl")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.steps)
    # The process that waits for its turn must not spin.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    git = ["git", "-C", str(TREE), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        subprocess.run([*git, "add", "--detach", "--quiet", str(other), args.commit], check=True)
        try:
            print(f"| layer | s at {args.commit} | s now | ratio | its quartiles |\n|---|---|---|---|---|", flush=True)
            for layer in args.layers.split(","):
                compared((other, TREE), layer, args.steps, args.rounds)
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=True)


if __name__ == "__main__":
    main()
