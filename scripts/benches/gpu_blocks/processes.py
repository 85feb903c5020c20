"""Block `processes`: image-steps a second of 1, 2 and 4 processes on one device."""

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from gpu_blocks import networks
from gpu_blocks.bench import Bench
from gpu_blocks.networks import BATCH, LAYERS, RESNET
from gpu_blocks.rendering import spread
from gpu_blocks.speed import OWN, size_of

# Share of the memory of the device that all processes together may use.
MEMORY_SHARE = 0.9
# A process that is not ready by then is given up.
START_SECONDS = 120


class _Over(Exception):
    """The time of a measurement is over."""


def run(bench: Bench) -> None:
    most = 2 if bench.small else 4
    names = (LAYERS[0],) if bench.small else ("layer1.1.conv2", LAYERS[7])
    seconds = 1.0 if bench.small else 3.0
    bench.clean()
    context = multiprocessing.get_context("spawn")
    members: list[tuple[Any, Connection]] = []
    try:
        for _ in range(most):
            ours, theirs = context.Pipe()
            member = context.Process(target=serve, args=(theirs, bench.device, bench.carried, most, bench.small))
            member.start()
            members.append((member, ours))
        for _, pipe in members:
            answer(pipe, START_SECONDS)
        for name in names:
            alone = 0.0
            for _, pipe in members:  # outside the measurements: the variants of the network, kernels
                pipe.send((name, 0.0))
            for _, pipe in members:
                answer(pipe, START_SECONDS)
            for count in (n for n in (1, 2, 4) if n <= most):
                if not bench.has(2 * seconds, f"{name}, {count} processes"):
                    break
                working = [pipe for _, pipe in members[:count]]
                for pipe in working:
                    pipe.send((name, seconds))
                rate = sum(answer(pipe, START_SECONDS) for pipe in working)
                alone = alone or rate
                bench.row(
                    "processes", layer=name, processes=count, **{"image-steps/s": rate, "of one process": rate / alone}
                )
    finally:
        for member, pipe in members:
            pipe.close()
            member.join(10)
            if member.is_alive():
                member.kill()


def answer(pipe: Connection, seconds: float) -> float:
    """Return what a process answers."""
    if not pipe.poll(seconds):
        raise TimeoutError(f"a process did not answer in {seconds} s")
    value = pipe.recv()
    if isinstance(value, str):
        raise RuntimeError(f"a process failed: {value}")
    return value


def serve(pipe: Connection, device: str, carried: Path | None, members: int, small: bool) -> None:
    """Answer every (layer, seconds) with the image-steps a second, until the other end is closed."""
    try:
        if device != "cuda":
            torch.set_num_threads(1)
        bench = Bench(device, Path(), carried, small=small)
        net = networks.network(RESNET, device, carried)
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(MEMORY_SHARE / members)
        best, _ = networks.fast_precisions(bench.device)
        worker = networks.worker(net, device, batch=2 if small else BATCH, precision=best)
        pipe.send(0.0)
        while True:
            name, seconds = pipe.recv()
            pipe.send(rate(bench, net, worker, name, seconds))
    except (EOFError, OSError):
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def rate(bench: Bench, net: networks.Network, worker: Any, name: str, seconds: float) -> float:
    """Return the image-steps a second of renderings that last `seconds`; with 0, only warm up."""
    channels = spread(worker.setup.config.engine.batch, net.layers[name].channels)
    steps = 4 if not seconds else 1_000_000
    preset = networks.timing_preset(net.preset(name), min(steps, 4096))
    made, began = 0, 0.0

    def stop() -> None:
        nonlocal made, began
        if made == 0:
            bench.synchronize()
            began = time.perf_counter()
        if seconds and time.perf_counter() - began > seconds:
            raise _Over
        made += 1

    worker.stop = stop
    size = size_of(bench, net, OWN, name)
    try:
        worker.pictures(name, channels, size, preset)
    except _Over:
        pass
    finally:
        worker.stop = lambda: None
    bench.synchronize()
    return made * len(channels) / (time.perf_counter() - began) if seconds else 0.0
