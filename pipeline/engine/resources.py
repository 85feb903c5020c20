"""CPUs, GPUs and memory of workers, and the number of workers that fit on machines."""

import dataclasses
import math
from collections.abc import Sequence

import torch

from pipeline.config.schema import EngineConfig
from pipeline.core.machine import available_cores, available_memory

# A worker may use its share of this part of the machine's memory.
USABLE_MEMORY = 0.9

# Ray counts resources in units of one in so many.
UNITS = 10_000

# (CPUs, GPUs) of one machine.
Node = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class WorkerPool:
    """Number of workers and the resources of each.

    Attributes:
        workers: Number of workers.
        cpus: CPUs of one worker.
        gpus: GPUs of one worker; a fraction if several workers share one.
        device: Device of the workers, for example "cpu" or "cuda".
    """

    workers: int
    cpus: float
    gpus: float
    device: str

    @property
    def threads(self) -> int:
        """CPU threads of one worker."""
        return max(1, int(self.cpus))

    def room(self, nodes: Sequence[Node]) -> int:
        """Return how many of these workers fit on `nodes`; none spans two nodes."""
        return sum(
            min(_whole(c / self.cpus), _gpu_workers(g, self.gpus)) if self.gpus else _whole(c / self.cpus)
            for c, g in nodes
        )


def size_pool(config: EngineConfig, nodes: Sequence[Node], tasks: int | None = None) -> WorkerPool:
    """Resolve the `auto` settings of `config` for some machines.

    With GPUs there is one worker for each GPU, and the workers of a node share its cores; nodes without a GPU get no
    worker, because the last tasks of slow workers would delay the end of the run. Without GPUs there is one worker for
    each core: two cores finish more images with two workers than with one worker of two threads (measured).

    Args:
        config: Settings of the engine.
        nodes: (CPUs, GPUs) of each machine.
        tasks: Upper bound of the number of workers.
    """
    device = config.device
    if device == "auto":
        wanted = config.gpus_per_worker
        # Workers of a cluster that take GPUs will run on them, also while there is no such node yet.
        awaited = config.name == "ray" and config.address is not None and not isinstance(wanted, str) and wanted > 0
        device = "cuda" if awaited or (sum(g for _, g in nodes) > 0 and wanted != 0) else "cpu"
    gpus = config.gpus_per_worker
    if isinstance(gpus, str):
        gpus = 1.0 if device.startswith("cuda") else 0.0
    if 0 < gpus < 1:
        gpus = _rounded(gpus)
    if config.name == "inline":
        cpus = config.cpus_per_worker
        return WorkerPool(1, sum(c for c, _ in nodes) if isinstance(cpus, str) else cpus, gpus, device)
    one = WorkerPool(1, _cpus_per_worker(config, nodes, gpus), gpus, device)
    workers = config.workers if isinstance(config.workers, int) else max(1, one.room(nodes))
    return dataclasses.replace(one, workers=max(1, workers if tasks is None else min(workers, tasks)))


def _cpus_per_worker(config: EngineConfig, nodes: Sequence[Node], gpus: float) -> float:
    """Return the CPUs of one worker that takes `gpus` GPUs."""
    if not isinstance(config.cpus_per_worker, str):
        return config.cpus_per_worker
    if gpus:
        # The node with the fewest cores per GPU decides, so that no GPU is left without a worker. Workers share a core
        # where there are not enough.
        shares = [c / _gpu_workers(g, gpus) for c, g in nodes if c and _gpu_workers(g, gpus)]
        share = min(shares, default=1.0)
        return float(_whole(share)) if share >= 1 else _rounded(share)
    if not isinstance(config.workers, int):
        return 1.0
    share = max(1.0, sum(c for c, _ in nodes) // config.workers)
    if len(nodes) > 1:
        share = min(share, max(c for c, _ in nodes) or 1.0)
    return share


def _whole(ratio: float) -> int:
    """Round a ratio of resources down; it counts as a whole number if only rounding made it less."""
    return math.floor(ratio + 1e-6)


def _rounded(amount: float) -> float:
    """Round an amount of a resource down to units of Ray, which rounds to the nearest: 1/7 would fit six times."""
    return max(1, _whole(amount * UNITS)) / UNITS


def _gpu_workers(gpus: float, each: float) -> int:
    """Return how many workers that take `each` GPUs fit on `gpus`; a fraction is one of a single GPU."""
    if each >= 1 or gpus < 1:
        return _whole(gpus / each)
    return _whole(gpus) * _whole(1 / each)


def local_resources() -> tuple[int, int]:
    """Return (CPU cores that this process may use, GPUs) of this machine."""
    return available_cores(), torch.cuda.device_count() if torch.cuda.is_available() else 0


def memory_share(threads: int) -> float:
    """Return the bytes of memory that one worker of `threads` threads may use.

    It is the share of its cores among those that this process may use, of `USABLE_MEMORY` of the memory of the machine
    or of the container.
    """
    return USABLE_MEMORY * available_memory() * min(1.0, threads / available_cores())
