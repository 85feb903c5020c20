"""A layer's maps, reduced in one reading to five numbers an image and channel.

The maps of all convolutions of a small network are tens of megabytes an image: reading them five times costs more
than the network itself. reduction.c reads them once, row by row as they lie in memory, for which any C compiler is
enough; on a GPU `torch.compile` makes one loop of the five reductions. Where there is no compiler, or compiling would
not pay, the same lines run one after the other.
"""

import ctypes
import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import first_line
from pipeline.kernels import build

log = logging.getLogger(__name__)

# What `reduce` returns, along its first axis.
PEAK, LOW, SHIFT, SQUARE, POSITIVE = range(5)


# Positions whose sums are float32, at most: few enough for their last bits, many enough that the sums of these weigh
# nothing beside the maps.
TOGETHER = 256


@functools.cache
def together(places: int) -> int:
    """How many of a map's places are summed in float32: as many as divide it, within `TOGETHER`, and not all of it.

    Not all, for the compiled loop wants more than one of everything.
    """
    return max((n for n in range(1, min(TOGETHER, places // 2) + 1) if places % n == 0), default=1)


def parts(maps: Tensor, centre: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(B, n, P, C) maps in n parts of P positions → five (B, n, C): largest, smallest, Σd, Σd², count above 0.

    d is the distance to `centre`, (C,): squares about a value near the mean do not cancel. Float32 sums are short,
    and none is ever split among threads: its last bit is the same whoever computes it.
    """
    distance = maps - centre
    above = (maps > 0).to(maps.dtype)
    return maps.amax(2), maps.amin(2), distance.sum(2), (distance * distance).sum(2), above.sum(2)


def whole(maps: Tensor, centre: Tensor, places: Tensor) -> Tensor:
    """(B, n, P, C) maps of so many `places` (float64) → (5, B, C) float32: maximum, minimum, three means.

    Sums over parts are float64, and rounded once.
    """
    peak, low, *sums = parts(maps, centre)
    # Converted apart from the sum: the compiler makes vector code of this, and none of a sum of another type.
    means = [(part.double().sum(1) / places).float() for part in sums]
    return torch.stack([peak.amax(1), low.amin(1), *means])


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of tensors as one compiled loop, or as it is (said in the log) where compiling does not work here.

    Compiled once for all sizes above 1, with gradients off whoever calls: a loop compiled anew takes ten seconds.
    """
    fast = torch.compile(function, dynamic=True)
    works = True

    def call(*tensors: Tensor) -> Any:
        nonlocal works
        if works and all(size > 1 for tensor in tensors for size in tensor.shape):
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the compiler's own, on a first shape
                    return fast(*tensors)
            except Exception as error:
                # Whatever is wrong with compilers on this machine, the pass itself needs none.
                log.info("%s runs uncompiled: %s", function.__name__, first_line(error))
                works = False
        return function(*tensors)

    return call


@functools.cache
def loop() -> Callable[[Tensor, Tensor], Tensor] | None:
    """reduction.c: (B, P, C) maps and (C,) centres → (5, B, C), all float32 on the CPU; None where not compiled."""
    library = build.library("spatial_stats")
    if library is None:
        return None
    reduce = library.reduce
    reduce.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_ssize_t] * 3
    reduce.restype = None

    def call(maps: Tensor, centre: Tensor) -> Tensor:
        maps, centre = maps.contiguous(), centre.contiguous()
        found = maps.new_empty(5, maps.shape[0], maps.shape[2])
        reduce(maps.data_ptr(), centre.data_ptr(), found.data_ptr(), *maps.shape)
        return found

    return call


class Reducer:
    """Reduces maps, with a compiled loop if `compile`."""

    def __init__(self, compile: bool) -> None:
        self._native = loop() if compile else None
        self._whole: Callable[..., Any] = compiled(whole) if compile else whole

    def __call__(self, maps: Tensor, centre: Tensor) -> Tensor:
        """(B, C, H, W) maps → (5, B, C) float32: maximum, minimum, mean d, mean d², share of positions above 0."""
        last = maps.permute(0, 2, 3, 1).float().flatten(1, 2)
        on_cpu = last.device.type == "cpu"
        if on_cpu and self._native:
            return self._native(last, centre)
        places = torch.tensor(float(last.shape[1]), dtype=torch.float64, device=last.device)
        function = whole if on_cpu else self._whole
        return function(last.unflatten(1, (-1, together(last.shape[1]))), centre, places)
