"""Block `memory`: a batch that does not fit is halved, and nothing is lost.

On a GPU all of its memory but a few GB is taken before. On a CPU the error is raised by hand.
"""

import contextlib
import time
from typing import Any

import torch

from gpu_blocks import networks
from gpu_blocks.bench import Bench
from gpu_blocks.networks import LAYERS, RESNET
from gpu_blocks.rendering import spread
from gpu_blocks.speed import GOAL, size_of

# Memory that is left on the card, of which the network needs a part.
LEFT_GB = 4


def run(bench: Bench) -> None:
    net = networks.network(RESNET, bench.device, bench.carried)
    name, asked = (LAYERS[0], 4) if bench.small else (LAYERS[8], 256)
    best, _ = networks.fast_precisions(bench.device)
    worker = networks.worker(net, bench.device, batch=asked, precision=best)
    channels, size = spread(asked, net.layers[name].channels), size_of(bench, net, GOAL, name)
    preset = networks.timing_preset(net.preset(name), 4 if bench.small else 20)
    bench.clean()
    hog: list[torch.Tensor] = []
    if bench.device == "cuda":
        worker.pictures(name, channels[:2], size, networks.timing_preset(preset, 2))
        bench.clean()
        hog = all_but(LEFT_GB)
    else:
        worker.stop = refusing(worker, asked // 2)
    began = time.perf_counter()
    try:
        pictures = worker.pictures(name, channels, size, preset)
        bench.synchronize()
    finally:
        worker.stop = lambda: None
        hog.clear()
        bench.clean()
    fits = min(worker.fits.values(), default=asked)
    finite = all(abs(p.activation) < float("inf") for p in pictures)
    bench.row(
        "out of memory", asked=asked, fits=fits, images=len(pictures), seconds=time.perf_counter() - began,
        ok=bool([p.channel for p in pictures] == channels and finite), halved=fits < asked,
    )  # fmt: skip


def all_but(gigabytes: int) -> list[torch.Tensor]:
    """Take all memory that this process may have on the card, but so much; also the driver has that much left."""
    taken: list[torch.Tensor] = []
    with contextlib.suppress(torch.OutOfMemoryError):
        while True:
            taken.append(torch.empty(10**9, dtype=torch.uint8, device="cuda"))
    del taken[-gigabytes:]
    torch.cuda.empty_cache()
    return taken


def refusing(worker: Any, most: int) -> Any:
    """Return a function for every step that raises the error of a full device for batches above `most` images."""

    def stop() -> None:
        if min(worker.fits.values(), default=2 * most) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. (raised by hand)")

    return stop
