"""Block `whole`: one layer from the task to the bytes of its shard, through the worker, and where the seconds go."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gpu_blocks import networks
from gpu_blocks.bench import Bench, attributes
from gpu_blocks.levers import BESIDE_THE_DEVICE, Switch
from gpu_blocks.networks import BATCH, LAYERS, RESNET, Network
from gpu_blocks.rendering import spread
from pipeline.engine.tasks import RenderTask
from pipeline.store import shards
from pipeline.visualization import loop


def run(bench: Bench) -> None:
    net = networks.network(RESNET, bench.device, bench.carried)
    for name, batches in ((LAYERS[0], 2),) if bench.small else ((LAYERS[7], 1), (LAYERS[7], 4), (LAYERS[2], 1)):
        if bench.has(3 + 3 * batches, f"{name}, {batches} batches"):
            measured(bench, net, name, batches, Switch())
    off = BESIDE_THE_DEVICE.off
    if not off.missing() and bench.has(12, f"the same without {BESIDE_THE_DEVICE.name}"):
        measured(bench, net, LAYERS[0] if bench.small else LAYERS[7], 2 if bench.small else 4, off)


def measured(bench: Bench, net: Network, name: str, batches: int, switch: Switch) -> None:
    """Execute one task, and print its seconds by part."""
    best, _ = networks.fast_precisions(bench.device)
    batch = 2 if bench.small else BATCH
    channels = spread(batch * batches, net.layers[name].channels)
    size, config = (32, 32) if bench.small else net.sizes[name], net.config
    if bench.small:
        config = dataclasses.replace(config, render=networks.timing_preset(config.render, 4))
    bench.clean()
    task = RenderTask(str(bench.out / "whole.h5"), "bench", 1.0, name, tuple(channels), size, config.render.name)
    steps: list[float] = []
    spent = {"evaluation": 0.0, "serialization": 0.0}
    with switch.applied(), counted(bench, spent):
        worker = networks.worker(net, bench.device, config=config, batch=batch, precision=best)
        worker.stop = lambda: steps.append(time.perf_counter())
        preset = config.preset_for(config.render.name, net.layers[name])
        once = bench.wall(lambda: worker.variants(net.layers[name], preset, size))
        began = time.perf_counter()
        worker.do(task)
        seconds = time.perf_counter() - began
    arrays = found.get("channels", "status") if (found := shards.read(Path(task.path))) else {}
    complete = list(arrays.get("channels", ())) == channels
    states = [s.decode() if isinstance(s, bytes) else str(s) for s in np.ravel(arrays.get("status", ()))]
    bench.row(
        "layer, end to end", layer=name, units=len(channels), batches=batches, px=size[0],
        off="" if switch == Switch() else BESIDE_THE_DEVICE.name, seconds=seconds,
        **{"variants, before": once, "until the first step": steps[0] - began, **spent},
        **{"steps made": len(steps) // batches, "images an hour": 3600 * len(channels) / seconds},
        **{"failed": states.count("failed"), "complete": complete},
        **{"MB": Path(task.path).stat().st_size / 1e6},
        **bench.memory(),
    )  # fmt: skip
    Path(task.path).unlink()


@contextlib.contextmanager
def counted(bench: Bench, spent: dict[str, float]) -> Iterator[None]:
    """Add the seconds of evaluation and serialization to `spent`."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            bench.synchronize()
            began = time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    with attributes(
        (loop, "evaluate", timed("evaluation", loop.evaluate)),
        (shards, "to_bytes", timed("serialization", shards.to_bytes)),
    ):
        yield
