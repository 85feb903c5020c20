"""Floating-point precision: of optimization steps, and of everything that is measured.

Measurements are computed in IEEE float32 on every device. PyTorch lets convolutions on NVIDIA GPUs round their inputs
to TF32, with 10 bits of mantissa, unless it is told otherwise. Steps may use TF32 or bfloat16, by name.

The flags of PyTorch are those of the process, not of a thread: work that these contexts hold for must not run in two
threads at once with different precisions. The flags of PyTorch before 2.9 are used, which later versions accept as
well; they raise an error when they are read after the newer ones (`fp32_precision`) were set to something that they
cannot express, for example by the code of a network. `_Flags.read` then reads the newer ones.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.core.errors import AtlasError

# Precisions of steps, as results record them: IEEE float32, float32 with products in TF32, and bfloat16.
PRECISIONS = ("float32", "tf32", "bfloat16")

# Compute capability of CUDA devices from which on they multiply TF32 and bfloat16 (Ampere).
TENSOR_CORES = (8, 0)

# Compute capabilities of CUDA devices whose rate in float64 is half that in float32 (P100, V100, A100, H100, B200);
# others have 1/32 or 1/64 of it.
FULL_RATE_FLOAT64 = frozenset({(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)})

# Compute capability of a CUDA device: major and minor number.
Capability = tuple[int, int]


@functools.cache
def multiplies_bfloat16() -> bool:
    """Return whether this processor has instructions for products of bfloat16 (AVX512_BF16 or AMX)."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in cpuinfo or "amx_bf16" in cpuinfo


def capability_of(device: str | torch.device) -> Capability | None:
    """Return the compute capability of a CUDA device; None for other devices, and if this machine has no GPU."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def precision_of(setting: str, device: str, capability: Capability | None = None) -> str:
    """Return the precision of optimization steps, one of `PRECISIONS`.

    Args:
        setting: "float32", "tf32", "bfloat16", or "auto": bfloat16 where the device multiplies it, else float32.
        device: Type of the device, such as "cpu".
        capability: Its compute capability; None if it is not a CUDA device, or if it is on another machine. Of the
            latter, "auto" assumes that they have `TENSOR_CORES`; their workers find out (`usable`).

    Raises:
        AtlasError: If TF32 is asked for on a device other than CUDA.
    """
    if setting == "auto":
        if device == "cuda":
            able = capability is None or capability >= TENSOR_CORES
        else:
            able = device == "cpu" and multiplies_bfloat16()
        return "bfloat16" if able else "float32"
    if setting == "tf32" and device != "cuda":
        raise AtlasError(
            f"engine.precision=tf32 is a number format of NVIDIA GPUs, and the workers run on {device}: use auto, "
            "float32 or bfloat16."
        )
    return setting


def usable(precision: str, device: str, capability: Capability | None) -> str:
    """Return the precision that a device computes steps in, of those that were asked for and float32.

    CUDA devices before Ampere ignore TF32, and have only slow loops for bfloat16.

    Args:
        precision: One of `PRECISIONS`.
        device: Type of the device.
        capability: Its compute capability; None if it is not a CUDA device.
    """
    too_old = device == "cuda" and capability is not None and capability < TENSOR_CORES
    return "float32" if too_old else precision


def has_tf32(device: torch.device) -> bool:
    """Return whether a device multiplies TF32."""
    capability = capability_of(device)
    return capability is not None and capability >= TENSOR_CORES


def dtype_of(precision: str) -> torch.dtype:
    """Return the data type of weights and activations in a precision of steps."""
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def float64_device(device: torch.device, capability: Capability | None) -> torch.device:
    """Return the device for computations in float64 on data of `device`: the same, or the CPU.

    Args:
        device: The device.
        capability: Its compute capability; None if it is not a CUDA device.
    """
    return device if device.type == "cuda" and capability in FULL_RATE_FLOAT64 else torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class _Flags:
    """Flags of PyTorch that change results on CUDA devices.

    Attributes:
        tf32: Whether cuDNN may use TF32.
        matmul: Precision of matrix products: "highest", "high" (TF32) or "medium" (on a CPU bfloat16).
        benchmark: Whether cuDNN chooses algorithms by timing them.
        deterministic: Whether cuDNN uses deterministic algorithms only.
        default: Precision of all operators whose own is not set, which are those whose flag here is off; None before
            PyTorch 2.9.
    """

    tf32: bool
    matmul: str
    benchmark: bool
    deterministic: bool
    default: str | None

    @classmethod
    def read(cls) -> "_Flags":
        cudnn = torch.backends.cudnn
        try:
            tf32 = cudnn.allow_tf32
        except RuntimeError:
            tf32 = cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue] (PyTorch 2.9)
        try:
            matmul = torch.get_float32_matmul_precision()
        except RuntimeError:
            matmul = "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
        return cls(tf32, matmul, cudnn.benchmark, cudnn.deterministic, getattr(torch.backends, "fp32_precision", None))

    def write(self) -> None:
        if self.default is not None:
            torch.backends.fp32_precision = self.default  # pyright: ignore[reportAttributeAccessIssue] (PyTorch 2.9)
        torch.backends.cudnn.allow_tf32 = self.tf32
        torch.set_float32_matmul_precision(self.matmul)
        torch.backends.cudnn.benchmark = self.benchmark
        torch.backends.cudnn.deterministic = self.deterministic

    def with_tf32(self, on: bool) -> "_Flags":
        default = None if self.default is None else "none"
        return dataclasses.replace(self, tf32=on, matmul="high" if on else "highest", default=default)


@contextlib.contextmanager
def ieee(deterministic: bool = False) -> Iterator[None]:
    """Compute float32 by IEEE 754 in the block, or in the function that this decorates: for all that is measured.

    The former flags are restored at the end.

    Args:
        deterministic: Whether cuDNN uses deterministic algorithms only, for results that are merged from parts.
    """
    before = _Flags.read()
    deterministic = deterministic or before.deterministic
    with _applied(dataclasses.replace(before.with_tf32(False), benchmark=False, deterministic=deterministic), before):
        yield


@contextlib.contextmanager
def steps_in(precision: str) -> Iterator[None]:
    """Compute float32 in TF32 in the block if `precision`, one of `PRECISIONS`, says so, and else by IEEE 754.

    The former flags are restored at the end.
    """
    before = _Flags.read()
    with _applied(before.with_tf32(precision == "tf32"), before):
        yield


@contextlib.contextmanager
def _applied(flags: _Flags, before: _Flags) -> Iterator[None]:
    flags.write()
    try:
        yield
    finally:
        before.write()
