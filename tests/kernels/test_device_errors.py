"""Which errors of a GPU a smaller batch may avoid, which end the process, and which are ordinary errors of the work."""

from typing import Any

import pytest
import torch
from conftest import tiny_model

from pipeline.acceleration import variants
from pipeline.acceleration.batchnorm_folding import foldable_pairs
from pipeline.core.errors import AtlasError
from pipeline.kernels import spatial_stats
from pipeline.kernels.device_errors import is_device_failure, is_device_lost, is_out_of_memory
from pipeline.layers.tracing import Trace

MEMORY = [
    torch.OutOfMemoryError(),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
]
LOST = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA driver error: unspecified launch failure"),
    RuntimeError("Triton Error [CUDA]: misaligned address"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuFFT error: CUFFT_EXEC_FAILED"),
    RuntimeError("CUDA error: Device-Side Assert triggered"),
]
OTHER = [
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    AtlasError("CUDA error: in words of this project"),
    ValueError("out of memory"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", MEMORY, ids=str)
def test_memory_that_is_full_is_told_by_class_or_text(error: BaseException) -> None:
    assert is_out_of_memory(error) and is_device_failure(error) and not is_device_lost(error)


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_lost_context_is_told_by_its_text(error: BaseException) -> None:
    assert is_device_lost(error) and is_device_failure(error) and not is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_errors_of_the_work_are_neither(error: BaseException) -> None:
    assert not is_device_failure(error)


def test_a_gpu_that_answers_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that was not compiled for the card has the same text, and leaves the context as it is."""
    error, answers = torch.AcceleratorError("CUDA error: no kernel image is available"), iter([True, False])

    def synchronize() -> None:
        if not next(answers):
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert not is_device_lost(error)
    assert is_device_lost(error)


@pytest.mark.parametrize("error", [MEMORY[1], LOST[0]], ids=str)
def test_a_failing_device_is_no_property_of_a_network(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    """These would say: no channels-last, no folding, does not take its own images."""

    def fail(*_: Any) -> Any:
        raise error

    model = tiny_model()
    monkeypatch.setattr(type(model.module), "forward", fail)
    for work in (lambda: model.to("cpu"), lambda: foldable_pairs(model), lambda: Trace(model)):
        with pytest.raises(RuntimeError, match="CUDA error"):
            work()


@pytest.mark.parametrize("error", [MEMORY[1], LOST[0]], ids=str)
def test_a_failing_device_is_no_deviation_of_a_variant(error: RuntimeError) -> None:
    def make() -> Any:
        raise error

    reference = variants._Reference(tiny_model(), [], torch.zeros(2, 3, 32, 32), {})
    with pytest.raises(RuntimeError, match="CUDA error"):
        reference.first_equal([variants._Candidate("lowered", make)], [])


def test_a_failing_device_is_no_fault_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([MEMORY[1], LOST[0], RuntimeError("no C++ compiler")])

    def fail(*_: Any) -> Any:
        raise next(errors)

    def plain(maps: torch.Tensor) -> torch.Tensor:
        return maps + 1

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    call, maps = spatial_stats.compile_or_fallback(plain), torch.ones(2, 2)
    for message in ("out of memory", "illegal memory access"):
        with pytest.raises(torch.AcceleratorError, match=message):
            call(maps)
    # Only what says something about the compiler turns it off.
    assert torch.equal(call(maps), maps + 1) and torch.equal(call(maps), maps + 1)
