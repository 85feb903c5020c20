"""Spatial statistics of activation maps: five numbers per image and channel, computed in one pass over the maps.

The activation maps of all convolutions of a small network take tens of megabytes per image; reading them five times
costs more than the network itself. spatial_stats.c reads them once, in memory order, on the CPU. On a GPU
`torch.compile` fuses the five reductions into one kernel. Where neither works, the same operations run one by one.
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
from pipeline.kernels.device_errors import is_device_failure

log = logging.getLogger(__name__)

# Rows of the first axis of what `Reducer` returns.
MAXIMUM, MINIMUM, MEAN_DEVIATION, MEAN_SQUARE, ACTIVE_SHARE = range(5)


# Maximum number of positions that are summed in float32: few enough for small rounding errors, enough that the float64
# sums over these chunks cost nothing compared with reading the maps.
MAX_CHUNK = 256


@functools.cache
def chunk_length(positions: int) -> int:
    """Return how many positions of a map to sum in float32: their largest divisor within `MAX_CHUNK`.

    At most half of the positions, because the compiled function requires every size to exceed 1.
    """
    return max((n for n in range(1, min(MAX_CHUNK, positions // 2) + 1) if positions % n == 0), default=1)


def reduce_chunks(maps: Tensor, center: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Reduce each chunk of positions to its maximum, minimum, Σd, Σd² and number of values above 0.

    d is the distance from `center`; squares about a value near the mean do not suffer from cancellation. The float32
    sums are short and never split among threads, so that their bits do not depend on the number of threads.

    Args:
        maps: (B, n, P, C), in n chunks of P positions.
        center: (C,).

    Returns:
        Five tensors (B, n, C).
    """
    distance = maps - center
    positive = (maps > 0).to(maps.dtype)
    return maps.amax(2), maps.amin(2), distance.sum(2), (distance * distance).sum(2), positive.sum(2)


def reduce_maps(maps: Tensor, center: Tensor, positions: Tensor) -> Tensor:
    """Reduce maps to their maximum, minimum, mean d, mean d² and share of values above 0.

    Sums over chunks are float64 and rounded once.

    Args:
        maps: (B, n, P, C), in n chunks of P positions.
        center: (C,).
        positions: Number of positions of a map, n × P, as a float64 scalar.

    Returns:
        (5, B, C) float32.
    """
    maximum, minimum, *sums = reduce_chunks(maps, center)
    # Convert before summing: the compiler vectorizes this, but not a sum into another dtype.
    means = [(chunk_sum.double().sum(1) / positions).float() for chunk_sum in sums]
    return torch.stack([maximum.amax(1), minimum.amin(1), *means])


@functools.cache
def compile_or_fallback(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled with `torch.compile`, falling back to `function` itself where compiling fails.

    It is compiled once for all sizes above 1, and always without gradients, because each compilation takes ten seconds.
    A failure is logged.
    """
    fast = torch.compile(function, dynamic=True)
    works = True

    def call(*tensors: Tensor) -> Any:
        nonlocal works
        if works and all(size > 1 for tensor in tensors for size in tensor.shape):
            try:
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # warnings of the compiler itself, with the first shape
                    return fast(*tensors)
            except Exception as error:
                if is_device_failure(error):
                    raise  # the caller continues with a smaller batch; uncompiled, these maps need even more memory
                # The dataset pass works without a compiler, whatever is wrong with the one of this machine.
                log.info("%s runs uncompiled: %s", function.__name__, first_line(error))
                works = False
        return function(*tensors)

    return call


@functools.cache
def load_c_loop() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return a wrapper of spatial_stats.c, or None if it cannot be compiled.

    It takes maps (B, P, C) and centers (C,), and returns (5, B, C); all are float32 on the CPU.
    """
    library = build.load_library("spatial_stats")
    if library is None:
        return None
    reduce = library.reduce
    reduce.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_ssize_t] * 3
    reduce.restype = None

    def call(maps: Tensor, center: Tensor) -> Tensor:
        maps, center = maps.contiguous(), center.contiguous()
        output = maps.new_empty(5, maps.shape[0], maps.shape[2])
        reduce(maps.data_ptr(), center.data_ptr(), output.data_ptr(), *maps.shape)
        return output

    return call


class Reducer:
    """Reduce activation maps to five statistics.

    Args:
        compile: Whether to use the C loop on the CPU and `torch.compile` elsewhere.
    """

    def __init__(self, compile: bool) -> None:
        self._c_loop = load_c_loop() if compile else None
        self._reduce_maps: Callable[..., Any] = compile_or_fallback(reduce_maps) if compile else reduce_maps

    def __call__(self, maps: Tensor, center: Tensor) -> Tensor:
        """Return the statistics of maps (B, C, H, W) as (5, B, C) float32.

        They are the maximum, minimum, mean d, mean d² and share of positions above 0, where d = map - `center`, and
        `center` is (C,).
        """
        rows = maps.permute(0, 2, 3, 1).float().flatten(1, 2)
        on_cpu = rows.device.type == "cpu"
        if on_cpu and self._c_loop:
            return self._c_loop(rows, center)
        positions = _positions(rows.shape[1], rows.device)
        function = reduce_maps if on_cpu else self._reduce_maps
        return function(rows.unflatten(1, (-1, chunk_length(rows.shape[1]))), center, positions)


@functools.cache
def _positions(count: int, device: torch.device) -> Tensor:
    """Return a number of positions as a float64 scalar of a device, uploaded once.

    A GPU multiplies by the reciprocal of a divisor that is on the CPU, which rounds differently.
    """
    return torch.tensor(float(count), dtype=torch.float64, device=device)
