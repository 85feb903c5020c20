"""The device of a worker: whether this machine has it, and what a process sets up before its first use.

Everything here is in time before CUDA starts in a process: PyTorch reads its settings then.
"""

import gc
import os
from collections.abc import Callable
from typing import TypeVar

import torch

from pipeline.acceleration.cuda_graphs import release_graphs
from pipeline.config.schema import EngineConfig
from pipeline.core.errors import AtlasError
from pipeline.core.machine import COMPILER_LIMIT
from pipeline.kernels.device_errors import is_out_of_memory

T = TypeVar("T")

# Variables with the settings of PyTorch's allocator on GPUs; the first since PyTorch 2.9, which warns of the second.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

# Segments that grow: batches of other sizes, and layers with other maps, find no memory in pieces of the wrong size.
ALLOCATOR_SETTINGS = "expandable_segments:True"

# Part of its share of a GPU that a worker may allocate; contexts and libraries take memory beside PyTorch's allocator.
ALLOCATED_SHARE = 0.95


def check_device(config: EngineConfig) -> None:
    """Check that the workers of a run can have the device that is set, as far as this machine can tell.

    Raises:
        AtlasError: If this machine has no such GPU, or the settings of the engine contradict each other.
    """
    device = config.device
    if not device.startswith("cuda"):
        return
    number = device.partition(":")[2]
    if number and config.name != "inline":
        raise AtlasError(
            f"engine.device={device} names one GPU, which only engine=inline can: Ray gives each worker a GPU of its "
            "own. Use engine.device=cuda, with CUDA_VISIBLE_DEVICES for some of the GPUs."
        )
    if config.name != "inline" and config.gpus_per_worker == 0:
        raise AtlasError(
            "engine.gpus_per_worker=0 hides the GPUs from workers, but they are to run on one: engine.device=cuda, or "
            "results of this run were made on one. Change either."
        )
    if config.name != "inline" and config.address is not None:
        return  # the nodes of the cluster decide
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise AtlasError(
            f"engine.device={device}, but PyTorch {torch.__version__} finds no GPU on this machine (look at nvidia-smi "
            "and at CUDA_VISIBLE_DEVICES): use engine.device=auto or cpu."
        )
    if number and int(number) >= count:
        raise AtlasError(
            f"engine.device={device}, but this machine has {count} GPU{'s' * (count > 1)}, counted from 0: use "
            f"engine.device=cuda:{count - 1} or less."
        )


def prepare_device(device: str, config: EngineConfig) -> None:
    """Set up this process for its work on `device`, before anything is put there; nothing on a CPU.

    Ray gives the workers that share a GPU no shares of its memory: the first would take all of it, and the others
    would run out of memory with any batch.
    """
    if not device.startswith("cuda"):
        return
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0 if torch.__version__ >= "2.9" else 1]] = ALLOCATOR_SETTINGS
    for name, value in COMPILER_LIMIT.items():
        os.environ.setdefault(name, value)
    if ":" in device:
        torch.cuda.set_device(device)
    share = config.gpus_per_worker
    if not isinstance(share, str) and 0 < share < 1:
        torch.cuda.set_per_process_memory_fraction(ALLOCATED_SHARE * share)


def free_memory() -> None:
    """Free the memory of work that is over, also for other processes on the same GPU.

    After an error it must be called outside of the exception handler, which still holds the tensors.
    """
    release_graphs()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def halved_until_it_fits(size: int, work: Callable[[int], T], note: Callable[[int, int], None] = lambda *_: None) -> T:
    """Return the result of `work` with batches of `size`, halved while the device runs out of memory.

    Args:
        size: Size of the first attempt.
        work: Called with a size.
        note: Called with each size that does not fit and the one that is tried next.
    """
    while True:
        try:
            return work(size)
        except Exception as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        note(size, size // 2)
        size //= 2
        free_memory()


def device_name(device: str) -> str:
    """Return the name of a GPU, such as "NVIDIA H100 80GB HBM3", or `device` if it is none."""
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if on_gpu else device
