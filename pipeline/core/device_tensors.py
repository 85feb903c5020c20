"""Small tensors that computations on a device need, without waiting for it.

A tensor that is made of Python numbers on a GPU, or copied there from ordinary memory, makes the host wait until the
GPU has done all earlier work. In a loop that is what keeps the GPU waiting in turn.
"""

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of `values`, (len(values),), that is made once for each device; it must not be changed.

    A tensor on a device is copied there at the first call only: loops may call this at every step.
    """
    return torch.tensor(values, dtype=dtype, device=device)


def constant_like(tensor: Tensor, values: tuple[float, ...]) -> Tensor:
    """Return `constant` in the data type and on the device of another tensor."""
    return constant(values, tensor.dtype, tensor.device)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on `device`. The host does not wait for the copy, and must not change the tensor after it."""
    if device.type == "cpu":
        return tensor.to(device)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
