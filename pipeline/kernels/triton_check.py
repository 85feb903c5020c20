"""Decide once for each GPU whether a Triton kernel is used.

A kernel runs only after it compiled and gave the results of the same computation in PyTorch for a small example. If it
does not, PyTorch computes everything: slower, but right.
"""

import contextlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.core.errors import first_line
from pipeline.kernels.device_errors import is_device_failure

log = logging.getLogger(__name__)

# Options of the compiler: products and sums are rounded separately, as in the C loops.
COMPILATION = {"enable_fp_fusion": False}

# Whether a kernel works, by its name and device.
_works: dict[tuple[str, torch.device], bool] = {}


def is_verified(name: str, device: torch.device, check: Callable[[torch.device], None]) -> bool:
    """Return whether a kernel works on a device. The first call finds out, and logs a warning if it does not.

    Args:
        name: Name of the kernel.
        device: The device, with its index.
        check: Runs the kernel on a small example, and raises an error if that fails or if the result is wrong.

    Raises:
        RuntimeError: If there is no memory for the example, or the device has failed. The next call tries again.
    """
    if (name, device) not in _works:
        # The check waits for the device, which is an error while a CUDA graph is captured.
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        _works[name, device] = _passes(name, device, check)
    return _works[name, device]


def _passes(name: str, device: torch.device, check: Callable[[torch.device], None]) -> bool:
    try:
        with torch.enable_grad():
            check(device)
    except Exception as error:
        if is_device_failure(error):
            raise
        # Triton and the compilers that it calls raise errors of many classes.
        log.warning(
            "the Triton kernel %s does not work on %s (%s: %s): PyTorch computes the same, more slowly.",
            name,
            device,
            type(error).__name__,
            first_line(error),
        )
        return False
    return True


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the GPU of a tensor the current one, where Triton starts its kernels."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
