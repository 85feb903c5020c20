"""Tensors that computations on a device need from the CPU, without the CPU waiting for the device.

A tensor that is made of Python numbers on a GPU, or copied there from ordinary memory, makes the CPU wait until the GPU
has done all earlier work. In a loop that is what keeps the GPU waiting in turn.
"""

import functools
import logging

import numpy as np
import torch
from torch import Tensor

from pipeline.core.errors import first_line

log = logging.getLogger(__name__)

CPU = torch.device("cpu")


@functools.lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of `values`, (len(values),), that is made once for each device; it must not be changed."""
    return torch.tensor(values, dtype=dtype, device=device)


def constant_like(tensor: Tensor, values: tuple[float, ...]) -> Tensor:
    """Return `constant` in the data type and on the device of another tensor."""
    return constant(values, tensor.dtype, tensor.device)


def upload(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Return values on a device; on the CPU they share their memory with the argument if they can.

    A copy to a GPU begins in page-locked memory, whose pages the driver reads by itself: the CPU neither waits for the
    copy nor for what the GPU computes before it.
    """
    host = torch.from_numpy(np.require(values, requirements=["C", "W"])) if isinstance(values, np.ndarray) else values
    return (pinned(host) if device.type == "cuda" else host).to(device, non_blocking=True)


def pinned(values: Tensor) -> Tensor:
    """Return a copy in page-locked memory, or the argument where the system grants no such memory."""
    try:
        return values.pin_memory()
    except RuntimeError as error:
        _say_once(first_line(error))
        return values


@functools.cache
def _say_once(reason: str) -> None:
    log.warning("Copies to the GPU wait for it, as no memory could be page-locked: %s", reason)
