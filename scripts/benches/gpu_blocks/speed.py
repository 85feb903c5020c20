"""Blocks `layers` and `batches`: time of a step against the bare loop, by layer, precision, canvas and batch."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from gpu_blocks import networks
from gpu_blocks.bench import Bench, attributes
from gpu_blocks.extrapolation import Point, minutes
from gpu_blocks.networks import BATCH, LAYERS, RESNET, Network
from gpu_blocks.rendering import Timed, spread, timed
from pipeline.acceleration.redirected_relu import REDIRECTED_STEPS
from pipeline.engine.worker import Worker
from pipeline.visualization.preset import Size

# Canvases: that of the default preset, with its steps; and the goal's side with its number of steps.
OWN, GOAL = "own canvas", "224 px"
GOAL_STEPS = 256
# The first step that is profiled: later than a step is captured, if steps are.
PROFILED = REDIRECTED_STEPS + 6


def size_of(bench: Bench, net: Network, kind: str, name: str) -> Size:
    """Return the canvas of a layer."""
    if bench.small:
        return (32, 32) if kind == OWN else (48, 48)
    return net.sizes[name] if kind == OWN else (224, 224)


def run(bench: Bench) -> None:
    """Time the layers in each precision on each canvas, and extrapolate to all channels."""
    net = networks.network(RESNET, bench.device, bench.carried)
    names = LAYERS[:2] if bench.small else LAYERS
    batch = 2 if bench.small else BATCH
    best, other = networks.fast_precisions(bench.device)
    for precision, kind in ((best, GOAL), (best, OWN), (other, GOAL), (other, OWN))[: 3 if bench.small else 4]:
        worker = networks.worker(net, bench.device, batch=batch, precision=precision)
        points = []
        for name in names:
            if bench.has(4, f"{name}, {precision}, {kind}"):
                points.append(measured(bench, net, worker, name, kind))
        if len(points) >= 2:
            total(bench, net, points, precision, kind)


def measured(bench: Bench, net: Network, worker: Worker, name: str, kind: str) -> Point:
    """Print a row of one layer: the bare loop and the whole step."""
    size, layer, batch = size_of(bench, net, kind, name), net.layers[name], worker.setup.config.engine.batch
    preset, channels = net.preset(name), spread(worker.setup.config.engine.batch, net.layers[name].channels)
    precision = worker.setup.config.engine.precision
    bench.clean()
    variants = worker.variants(layer, preset, size)
    bare = bare_seconds(bench, worker, name, size)
    ours = timed(bench, worker, name, channels, size, preset)
    cost = net.gigaflops(name, size)
    bench.row(
        "layer",
        layer=name,
        px=size[0],
        precision=precision,
        canvas=kind,
        batch=batch,
        **{
            "bare ms": 1e3 * bare,
            "step ms": 1e3 * ours.step,
            "of bare": bare / ours.step,
            "TFLOP/s": cost * batch / ours.step / 1e3,
            "first s": ours.first,
            "outside s": ours.outside,
        },
        **({"level": variants.level, "because": variants.reason[:80]} if variants.reason else {}),
    )
    if kind == OWN and precision == networks.fast_precisions(bench.device)[0] and name in (LAYERS[0], LAYERS[-2]):
        try:
            profiled(bench, worker, name, channels, size)
        except RuntimeError as error:  # profilers depend on more than PyTorch
            bench.row("profile", layer=name, failed=str(error)[:100])
    return Point(cost, batch, ours.step, ours.first, ours.outside, bare)


def bare_seconds(bench: Bench, worker: Worker, name: str, size: Size) -> float:
    """Return the seconds of a step of the bare loop in the precision of a worker."""
    layer, engine = worker.layers[name], worker.setup.config.engine
    variants = worker.variants(layer, worker.setup.config.render.for_layer(layer), size)
    dtype = torch.bfloat16 if engine.precision == "bfloat16" else torch.float32
    flag = contextlib.nullcontext() if dtype != torch.float32 else tf32(True)
    with flag, networks.bare_loop(variants.folded, layer, engine.batch, size, dtype) as step:
        return bench.step_seconds(step)


@contextlib.contextmanager
def tf32(on: bool) -> Any:
    """Let convolutions of float32 use TF32 or not, where PyTorch can be told."""
    try:
        changed = attributes((torch.backends.cudnn, "allow_tf32", on))
        changed.__enter__()
    except RuntimeError:  # the newer setting is in use, which this one must not be mixed with
        yield False
        return
    try:
        yield True
    finally:
        changed.__exit__(None, None, None)


def total(bench: Bench, net: Network, points: Sequence[Point], precision: str, kind: str) -> None:
    """Print the minutes of all channels by the cost of every layer."""
    table = [
        (net.gigaflops(name, size_of(bench, net, kind, name)), layer.channels) for name, layer in net.layers.items()
    ]
    steps = net.config.render.steps if kind == OWN else GOAL_STEPS
    loop, whole, alone = minutes(points, table, steps, REDIRECTED_STEPS)
    petaflops = sum(cost * channels for cost, channels in table) * steps / 1e6
    bench.row(
        "all channels",
        channels=sum(channels for _, channels in table),
        canvas=kind,
        steps=steps,
        precision=precision,
        layers=len(points),
        **{"loop min": loop, "with starts and evaluation min": whole, "PFLOP": petaflops},
        **{"bare min": alone, "of bare": alone / loop},
    )


def profiled(bench: Bench, worker: Worker, name: str, channels: Sequence[int], size: Size, steps: int = 4) -> None:
    """Print the kernels of a step and the share of the time in which the device works."""
    from torch.profiler import ProfilerActivity, profile

    preset = networks.timing_preset(worker.setup.config.render.for_layer(worker.layers[name]), PROFILED + steps + 2)
    cuda = bench.device == "cuda"
    recorder = profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])
    count, marks = 0, []

    def stop() -> None:
        nonlocal count
        if count in (PROFILED, PROFILED + steps):
            bench.synchronize()
            if marks:
                marks.append(bench.mark())
                bench.synchronize()
                recorder.stop()
            else:
                recorder.start()
                marks.append(bench.mark())
        count += 1

    worker.stop = stop
    try:
        worker.pictures(name, channels, size, preset)
    finally:
        worker.stop = lambda: None
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = [event for event in recorder.events() if event.device_type == wanted]
    busy = sum(event.time_range.elapsed_us() for event in events) / 1e6
    bench.row(
        "profile",
        layer=name,
        precision=worker.setup.config.engine.precision,
        **{"kernels a step": len(events) / steps, "busy share": busy / bench.between(*marks)},
    )


def batches(bench: Bench) -> None:
    """Time batches of several sizes in three layers, in the goal's size."""
    net = networks.network(RESNET, bench.device, bench.carried)
    names = (LAYERS[0],) if bench.small else (LAYERS[2], LAYERS[7], LAYERS[8])
    best, _ = networks.fast_precisions(bench.device)
    for name in names:
        for batch in (1, 2) if bench.small else (16, 32, 64, 128, 256):
            if not bench.has(2 + batch / 64, f"{name}, batch {batch}"):
                continue
            bench.clean()
            worker = networks.worker(net, bench.device, batch=batch, precision=best)
            channels = spread(batch, net.layers[name].channels)
            ours = timed(bench, worker, name, channels, size_of(bench, net, GOAL, name), net.preset(name))
            print_batch(bench, name, len(channels), ours)


def print_batch(bench: Bench, name: str, batch: int, ours: Timed) -> None:
    per_image = 1e3 * ours.step / batch
    bench.row("batch", layer=name, batch=batch, **{"ms an image-step": per_image}, **bench.memory())
