"""Kernels for a GPU compute what PyTorch computes: in Triton's interpreter here, and on a GPU where there is one."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.kernels import adam, affine_sample, triton_check

has_triton = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="PyTorch without CUDA")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@has_triton
@pytest.mark.long
def test_kernels_equal_pytorch_in_the_interpreter() -> None:
    script = Path(__file__).parent / "interpreted.py"
    root = str(Path(affine_sample.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@has_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To machine code, from the calls that start them, and once for all sizes: neither needs a GPU."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from pipeline.kernels import adam_triton, affine_sample_triton

    compiled: dict[str, set[str]] = {}
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        result = run(kernel, *args, grid=grid, warmup=True, **options)
        assert result.asm["cubin"]
        compiled.setdefault(kernel.__name__, set()).add(result.asm["ptx"])
        return result

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    device = 1000 + capability  # compiled kernels are kept by this number
    target = GPUTarget("cuda", capability, 32)
    functions = {"device": device, "stream": 0, "target": target}
    fake = {f"get_current_{name}": lambda *_, value=value: value for name, value in functions.items()}
    monkeypatch.setattr(driver, "_active", SimpleNamespace(**fake))
    images, matrices = torch.rand(2, 3, 9, 9).requires_grad_(True), torch.eye(3).repeat(3, 1, 1)
    for matrix, size in ((matrices[1:], (7, 1)), (matrices[:2], (16, 16))):
        affine_sample_triton.sample(images, matrix, size).sum().backward()
    for numbers in (torch.rand(8)[1:], torch.rand(7)):
        adam_triton.fused_adam(*(torch.rand(2, 5, 2) for _ in range(3)), torch.rand(2, 5, 1), numbers)
    assert {name: len(codes) for name, codes in compiled.items()} == dict.fromkeys(
        ("_sample", "_scatter", "_to_float", "_update_moments", "_move"), 1
    )
    # Only integers are added in any order.
    (scatter,) = compiled["_scatter"]
    assert "relaxed.add.u64" in scatter and "relaxed.add.f32" not in scatter


def test_a_kernel_that_fails_is_not_used_and_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton_check, "_works", {})
    checks = []

    def check(device: torch.device) -> None:
        checks.append(device)
        raise AssertionError("Tensor-likes are not close!\n\nMismatched elements")

    device = torch.device("cpu")
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        assert [triton_check.is_verified("adam", device, check) for _ in range(3)] == [False] * 3
    (record,) = caplog.records
    assert checks == [device] and "adam does not work on cpu (AssertionError: Tensor-likes" in record.getMessage()
    assert triton_check.is_verified("affine_sample", device, lambda _: None)


def test_no_memory_for_the_example_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_check, "_works", {})

    def full(_: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        triton_check.is_verified("adam", torch.device("cpu"), full)
    # In an evaluation without gradients too, the example has some.
    with torch.no_grad():
        assert triton_check.is_verified("adam", torch.device("cpu"), lambda _: check_gradients())


def check_gradients() -> None:
    assert torch.is_grad_enabled()


def test_resampling_in_pytorch_copies_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor made of a list would be copied to a GPU at every call."""

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("a copy from the host")

    monkeypatch.setattr(Tensor, "new_tensor", refuse)
    monkeypatch.setattr(torch, "tensor", refuse)
    matrix = torch.eye(3)[None]
    images = torch.rand(1, 2, 5, 7)
    torch.testing.assert_close(affine_sample.sample_with_pytorch(images, matrix, (5, 7)), images)
    assert torch.equal(matrix, torch.eye(3)[None])


def test_a_preparation_changes_nothing() -> None:
    """And more numbers than those of Adam may follow them."""
    tensors = torch.rand(2, 5, 2), torch.rand(2, 5, 2), torch.rand(2, 5, 1)
    before = [t.clone() for t in tensors]
    adam.prepare(*tensors)
    assert all(map(torch.equal, tensors, before))
    adam.step(tensors[0], torch.rand(2, 5, 2), *tensors[1:], torch.rand(9))
    assert not any(map(torch.equal, tensors, before))


@pytest.mark.gpu
@on_gpu
def test_a_gpu_resamples_with_triton_in_a_graph() -> None:
    device = torch.device("cuda:0")
    images = torch.rand(8, 3, 61, 47, device=device).requires_grad_(True)
    matrix = torch.eye(3, device=device).repeat(8, 1, 1)
    matrix[:, :2] += torch.randn(8, 2, 3, device=device)
    noise = torch.randn(8, 3, 41, 53, device=device)

    def step(function: object) -> tuple[Tensor, Tensor]:
        view = function(images, matrix, (41, 53))  # type: ignore[operator]
        return view.detach(), torch.autograd.grad((view * noise).sum(), images)[0]

    expected, found = step(affine_sample.sample_with_pytorch), step(affine_sample.sample)
    assert triton_check._works["affine_sample", device]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(affine_sample.sample)
    for _ in range(3):
        graph.replay()
        assert all(map(torch.equal, captured, found))


@pytest.mark.gpu
@on_gpu
def test_a_gpu_steps_with_triton() -> None:
    device = torch.device("cuda:0")
    tensors = [torch.rand(4, 3, 65, 33, 2, device=device) for _ in range(3)]
    second, numbers = torch.rand(4, 3, 65, 33, 1, device=device), torch.tensor([0.5, 0.9, 1, 0, 0.03, 1e-8, 0.1])
    copies = [t.clone() for t in (*tensors, second)]
    adam.prepare(tensors[0], tensors[2], second)
    assert triton_check._works["adam", device]
    adam.step(*tensors, second, numbers.to(device))
    adam.step_with_pytorch(*copies, numbers.to(device))
    torch.testing.assert_close([*tensors, second], copies, rtol=1e-5, atol=1e-5)
