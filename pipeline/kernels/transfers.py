"""Copies from the memory of the CPU to that of a device, during which the CPU goes on."""

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")


def upload(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Return values on a device; on the CPU they share their memory with the argument if they can.

    A copy to a GPU begins in page-locked memory, whose pages the driver reads by itself: the CPU neither waits for the
    copy nor for what the GPU computes before it.
    """
    host = torch.from_numpy(np.require(values, requirements=["C", "W"])) if isinstance(values, np.ndarray) else values
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
