"""Threads of a worker for what the CPU does while the device computes: draw numbers, compress images."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class Background:
    """Calls functions in threads beside the device, or later in the calling thread if the device is the CPU.

    A CPU that optimizes images has no core to spare: there, a call runs when its result is asked for, and takes place
    at the same point of the program as without this class.

    Args:
        device: Device of the network, as PyTorch names it.
        threads: Number of threads.
    """

    def __init__(self, device: str, threads: int) -> None:
        self.device = torch.device(device)
        self._pool: ThreadPoolExecutor | None = None
        if self.device.type != "cpu":
            self._pool = ThreadPoolExecutor(threads, "beside-the-device", initializer=self._select_device)

    @property
    def is_active(self) -> bool:
        """Whether calls run in other threads."""
        return self._pool is not None

    @property
    def pins_memory(self) -> bool:
        """Whether uploads from page-locked memory run beside the host."""
        return self.device.type == "cuda"

    def begin(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        """Begin a call of `function`.

        Returns:
            A function that waits for the call and returns its result, or raises its exception; to be called once.
        """
        if self._pool is None:
            return lambda: function(*args, **kwargs)
        return self._pool.submit(function, *args, **kwargs).result

    def _select_device(self) -> None:
        """Make the device of the worker the current one, which each thread has of its own: memory is pinned there."""
        if self.pins_memory and self.device.index is not None:
            torch.cuda.set_device(self.device)
