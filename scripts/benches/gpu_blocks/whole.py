"""Block `whole`: one layer from the task to the bytes of its shard, through the worker, and where the seconds go."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from gpu_blocks import networks
from gpu_blocks.bench import Bench
from gpu_blocks.networks import BATCH, LAYERS, RESNET
from gpu_blocks.rendering import spread
from pipeline.engine.tasks import RenderTask
from pipeline.store import shards


def run(bench: Bench) -> None:
    net = networks.network(RESNET, bench.device, bench.carried)
    best, _ = networks.fast_precisions()
    for name, batches in ((LAYERS[0], 1),) if bench.small else ((LAYERS[7], 1), (LAYERS[7], 4), (LAYERS[2], 1)):
        if not bench.has(0 if bench.small else 3 + 4 * batches, f"{name}, {batches} batches"):
            continue
        batch = 2 if bench.small else BATCH
        channels = spread(batch * batches, net.layers[name].channels)
        size = (32, 32) if bench.small else net.sizes[name]
        config = net.config
        if bench.small:
            config = dataclasses.replace(config, render=networks.timing_preset(config.render, 4))
        bench.clean()
        worker = networks.worker(net, bench.device, config=config, batch=batch, precision=best)
        task = RenderTask(str(bench.out / "whole.h5"), "bench", 1.0, name, tuple(channels), size, config.render.name)
        times: dict[str, Any] = {}
        pictures = worker.pictures

        def noted(*args: Any, times: dict[str, Any] = times, pictures: Any = pictures, **more: Any) -> Any:
            made = pictures(*args, **more)
            times["pictures"] = time.perf_counter()
            times["found"] = made
            return made

        worker.__dict__["pictures"] = noted
        steps: list[float] = []
        worker.stop = lambda steps=steps: steps.append(time.perf_counter())
        worker.variants(net.layers[name], config.preset_for(config.render.name, net.layers[name]), size)
        bench.synchronize()
        began = time.perf_counter()
        done = worker.do(task)
        ended = time.perf_counter()
        written = shards.read(Path(task.path))
        bench.row(
            "layer, end to end", layer=name, units=len(channels), batches=batches, px=size[0], seconds=ended - began,
            **{
                "until the first step": steps[0] - began,
                "first to last step": steps[-1] - steps[0],
                "last step to images": times["pictures"] - steps[-1],
                "serialization and file": ended - times["pictures"],
                "steps made": len(steps),
                "failed units": sum(p.status == "failed" for p in times["found"]),
                "images an hour": 3600 * len(channels) / (ended - began),
                "MB": Path(task.path).stat().st_size / 1e6,
                "complete": written is not None and len(written.get("channels")["channels"]) == len(channels),
                "restart": done.restart_reason,
            },
            **bench.memory(),
        )  # fmt: skip
        Path(task.path).unlink()
