"""Measure the cost of the optimization loop relative to the network alone, layer by layer.

scripts/bench render [--layers convs] [--include 'blocks.*'] [--render distill] [--threads N] [--seconds 2]
                     [--model resnet50] [--device cuda] [--batch 16] [--json FILE]

For each layer, with the same batch, size and threads, alternating: the bare loop (the folded network up to the layer,
forward and backward to its input, nothing else), the same for the lowered network, and the complete step (image,
transforms, network, optimizer). Rates are image-steps per second, compared as ratios within one run. Channels per hour
and the estimate for the full atlas include the work outside the steps: start, measurement, 16 transformed copies.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.acceleration.batchnorm_folding import fold, foldable_pairs
from pipeline.acceleration.precision import capability_of, precision_of, steps_in
from pipeline.acceleration.redirected_relu import REDIRECTED_STEPS
from pipeline.acceleration.variants import verified_variants
from pipeline.cli.compose import compose
from pipeline.config.schema import Config
from pipeline.kernels.allocator import retain_freed_memory
from pipeline.layers.finding import Layer, capture
from pipeline.layers.receptive_fields import receptive_fields
from pipeline.layers.selection import LayersConfig, list_layers, select_layers
from pipeline.models.loading import Model, load_model
from pipeline.planning.validation import choose_canvas_sizes
from pipeline.visualization.loop import render
from pipeline.visualization.render_job import RenderJob

# The time of a step is measured between these two: after the first steps, in which units without gradient run twice.
SHORT, LONG = REDIRECTED_STEPS, REDIRECTED_STEPS + 8


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def config_of(preset: str, model: str) -> Config:
    """Return the default configuration with another preset and network."""
    return compose([f"render={preset}", f"model={model}", "run.name=bench"]).config


def seconds(work: Callable[[], object], device: str) -> float:
    """Return the wall time of `work`, including its pending GPU work."""
    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def bare(
    model: Model, layer: Layer, batch: int, size: tuple[int, int], steps: int, precision: str
) -> Callable[[], None]:
    """Run `steps` forward and backward passes of the network up to `layer`."""
    device = next(model.module.parameters()).device
    pixels = torch.rand(batch, model.preprocessing.channels, *size, device=device).requires_grad_(True)
    rows = torch.arange(batch, device=device)

    def work() -> None:
        with steps_in(precision), capture(model, [layer]) as run:
            for _ in range(steps):
                found = run(pixels)[layer.name]
                torch.autograd.grad(found[rows, rows % found.shape[1]].float().mean(dim=(1, 2)).sum(), pixels)

    return work


def measured(model: Model, layer: Layer, config: Config, batch: int, least: float, device: str) -> dict[str, Any]:
    """Return one row of the table: medians over alternating rounds, for at least `least` seconds of each."""
    preset = config.render.for_layer(layer)
    size = choose_canvas_sizes(model, [layer], preset)[layer.name]
    precision = precision_of(config.engine.precision, torch.device(device).type, capability_of(device))
    found = verified_variants(model, foldable_pairs(model), [layer], precision, size)
    folded = found.folded
    units = [(c % layer.channels, c // layer.channels) for c in range(batch)]

    def ours(steps: int) -> Callable[[], object]:
        short = dataclasses.replace(preset, steps=steps, attempts=1)
        models = {"step_model": found.steps, "exact_model": found.exact}
        job = RenderJob(folded, layer, short, 0, size, **models, precision=found.precision)
        return lambda: render(job, units)

    loops = [bare(twin, layer, batch, size, LONG - SHORT, found.precision) for twin in (folded, found.steps)]
    for work in (*loops, ours(SHORT)):
        work()
    theirs, swift, own, fixed, spent = [], [], [], [], 0.0
    while spent < least or len(own) < 3:
        began = time.perf_counter()
        theirs.append(seconds(loops[0], device))
        swift.append(seconds(loops[1], device))
        short, long = seconds(ours(SHORT), device), seconds(ours(LONG), device)
        own.append(long - short)
        fixed.append(short)
        spent += time.perf_counter() - began
    each, lean, step = (statistics.median(times) / (LONG - SHORT) / batch for times in (theirs, swift, own))
    whole = max(0.0, statistics.median(fixed) / batch - SHORT * step) + preset.steps * step
    return {
        "layer": layer.name, "px": "x".join(map(str, size)), "channels": layer.channels,
        "bare, ms": round(1e3 * each, 3), "lowered, ms": round(1e3 * lean, 3), "ours, ms": round(1e3 * step, 3),
        "image-steps/s": round(1 / step, 1), "of bare": round(each / step, 3), "of lowered": round(lean / step, 3),
        "seconds a channel": round(whole, 3), "channels/h": round(3600 / whole),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--layers", default="convs")
    parser.add_argument("--include", default="", help="globs, separated by commas")
    parser.add_argument("--render", default="distill")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="workers that share the full atlas, for the estimate")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="at least so long a layer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    retain_freed_memory()
    torch.set_num_threads(options.threads)
    config = config_of(options.render, options.model)
    model = load_model(config.model).to(options.device)
    policy = LayersConfig(options.layers, tuple(p for p in options.include.split(",") if p))
    cpu = fold(load_model(config.model))
    chosen = select_layers(cpu, list_layers(cpu, policy, config.model.aliases), policy)
    fields = receptive_fields(cpu, chosen)
    rows = []
    for layer in chosen:
        layer = dataclasses.replace(layer, field=fields[layer.name])
        rows.append(measured(model, layer, config, options.batch, options.seconds, options.device))
        if len(rows) == 1:
            say("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
        say("| " + " | ".join(map(str, rows[-1].values())) + " |")
    hours = sum(row["channels"] * row["seconds a channel"] for row in rows) / options.workers / 3600
    total = sum(row["channels"] for row in rows)
    least = min(rows, key=lambda row: row["of bare"])
    say(f"{total:,} channels of {len(rows)} layers with {options.workers} workers that do not slow each other: "
        f"{hours:.1f} h; of the bare loop at least {least['of bare']:.1%} ({least['layer']}), "
        f"median {statistics.median(row['of bare'] for row in rows):.1%}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, "render": options.render, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
