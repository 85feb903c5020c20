"""Block `environment`: the machine, its versions, and the rates that nothing on it exceeds."""

import os
import platform
import subprocess
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_blocks.bench import Bench
from pipeline.core.machine import available_cores


def run(bench: Bench) -> None:
    versions(bench)
    bandwidth(bench)
    products(bench)
    launches(bench)
    stem(bench)


def versions(bench: Bench) -> None:
    """Print card, driver, and the versions of what computes."""
    cuda = bench.device == "cuda"
    free, total = torch.cuda.mem_get_info() if cuda else (None, None)
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        driver = "no nvidia-smi"
    bench.row(
        "machine",
        card=torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        capability=".".join(map(str, torch.cuda.get_device_capability())) if cuda else "",
        driver=driver,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if cuda else None,
        cores=available_cores(),
        **{"free GB": free and free / 1e9, "total GB": total and total / 1e9},
    )
    try:
        import triton

        bench.row("triton", version=triton.__version__, compiler=os.environ.get("CC", "gcc"))
    except ImportError:
        bench.row("triton", version="absent")


def bandwidth(bench: Bench) -> None:
    """Print the rate of a copy on the device, bytes read and written."""
    count = 2**22 if bench.small else 2**31
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.step_seconds(lambda: target.copy_(source), steps=4)
    bench.row("copy", **{"TB/s": 2 * count / seconds / 1e12})


def products(bench: Bench) -> None:
    """Print the rates of square matrix products of random numbers."""
    side = 256 if bench.small else 8192
    for name, dtype, tf32 in (
        ("bfloat16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):
        a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_tf32
        try:
            matmul.allow_tf32 = tf32
            seconds = bench.step_seconds(lambda a=a, b=b: a @ b, steps=4, rounds=3, warm=2)
        finally:
            matmul.allow_tf32 = before
        bench.row("matrix product", precision=name, **{"TFLOP/s": 2 * side**3 / seconds / 1e12})


def launches(bench: Bench) -> None:
    """Print the time that the host needs for one small operation."""
    x = torch.zeros(1, device=bench.device)

    def many() -> None:
        for _ in range(100):
            x.add_(1)

    bench.wall(many)
    bench.row("launch", **{"µs": min(bench.wall(many) for _ in range(5)) / 100 * 1e6})


def stem(bench: Bench) -> None:
    """Print the time of the first convolution of ResNet-50 for several numbers of input channels, channels-last."""
    batch, side = (2, 32) if bench.small else (64, 224)
    for channels in (3, 4, 8):
        shape = (batch, channels, side, side)
        x = torch.randn(shape, device=bench.device).to(torch.bfloat16, memory_format=torch.channels_last)
        weight = torch.randn(64, channels, 7, 7, device=bench.device)
        weight = weight.to(torch.bfloat16, memory_format=torch.channels_last)

        def forward(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            return F.conv2d(x, weight, None, 2, 3)

        bench.row(
            "stem, 7 × 7",
            channels=channels,
            **{"forward ms": 1e3 * bench.step_seconds(forward, rounds=3)},
            **{"gradient ms": 1e3 * bench.step_seconds(gradient(x, weight, torch.randn_like(forward())), rounds=3)},
        )


def gradient(x: Tensor, weight: Tensor, given: Tensor) -> Callable[[], Tensor]:
    """Return the function that computes the input gradient of the first convolution."""
    return lambda: torch.ops.aten.convolution_backward(
        given, x, weight, None, [2, 2], [3, 3], [1, 1], False, [0, 0], 1, [True, False, False]
    )[0]
