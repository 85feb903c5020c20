"""Devices before any work: those that a machine does not have are refused, and what a process sets up on a GPU."""

import os
import types
from typing import Any

import pytest
import torch
from conftest import TINY, compose

from pipeline.config.schema import EngineConfig
from pipeline.core.errors import AtlasError
from pipeline.engine import devices
from pipeline.engine.devices import check_device, device_name, free_memory, prepare_device
from pipeline.engine.ray_engine import RayEngine
from pipeline.engine.resources import size_pool
from pipeline.engine.worker import DeviceLost, Worker
from pipeline.planning.planner import make_plan


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A machine with two GPUs, as far as it is asked; the calls that would set them up."""
    calls: list[tuple[Any, ...]] = []

    def note(name: str) -> Any:
        return lambda *arguments: calls.append((name, *arguments))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"the card of {device}")
    monkeypatch.setattr(torch.cuda, "set_device", note("device"))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", note("fraction"))
    monkeypatch.setattr(devices, "os", types.SimpleNamespace(environ={}))
    return calls


@pytest.mark.parametrize("value", ["mps", "cuda:", "cuda:x", "gpu", "1", ""])
def test_unknown_devices_are_refused_with_the_known_ones(value: str) -> None:
    with pytest.raises(AtlasError, match=r"engine\.device.*use auto, cpu, cuda or, inline, cuda:N"):
        compose([*TINY, f"engine.device='{value}'"])


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_machine_without_a_gpu_refuses_it_before_any_work(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = compose([*TINY, f"engine.device={device}"]).config
    with pytest.raises(AtlasError, match=rf"engine\.device={device}, but PyTorch .* finds no GPU.*auto or cpu"):
        make_plan(config)
    check_device(EngineConfig(device="cpu"))
    check_device(EngineConfig(device="auto"))
    # The head of a cluster needs no GPU.
    check_device(EngineConfig(device="cuda", address="auto"))


@pytest.mark.usefixtures("two_gpus")
def test_a_certain_gpu_must_exist_and_is_for_inline_runs() -> None:
    for device in ("cuda", "cuda:0", "cuda:1"):
        check_device(EngineConfig(name="inline", device=device))
        assert size_pool(EngineConfig(name="inline", device=device), [(8, 2)]).device == device
    with pytest.raises(AtlasError, match=r"this machine has 2 GPUs, counted from 0: use engine\.device=cuda:1 or less"):
        check_device(EngineConfig(name="inline", device="cuda:2"))
    with pytest.raises(AtlasError, match=r"names one GPU, which only engine=inline can.*CUDA_VISIBLE_DEVICES"):
        check_device(EngineConfig(device="cuda:1"))
    with pytest.raises(AtlasError, match=r"gpus_per_worker=0 hides the GPUs"):
        check_device(EngineConfig(device="cuda", gpus_per_worker=0.0))


def test_workers_that_share_a_gpu_share_its_memory(two_gpus: list[tuple[Any, ...]]) -> None:
    prepare_device("cpu", EngineConfig())
    assert devices.os.environ == {} and two_gpus == []
    prepare_device("cuda", EngineConfig())
    prepare_device("cuda", EngineConfig(gpus_per_worker=1.0))
    assert two_gpus == []
    prepare_device("cuda", EngineConfig(gpus_per_worker=0.25))
    prepare_device("cuda:1", EngineConfig(name="inline"))
    assert two_gpus == [("fraction", pytest.approx(0.2375)), ("device", "cuda:1")]
    assert device_name("cuda:1") == "the card of cuda:1" and device_name("cpu") == "cpu"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("version", "name"), [("2.6.0+cu124", "PYTORCH_CUDA_ALLOC_CONF"), ("2.11.0+cu130", "PYTORCH_ALLOC_CONF")]
)
def test_segments_grow_unless_the_user_says_otherwise(version: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    prepare_device("cuda", EngineConfig())
    assert devices.os.environ[name] == "expandable_segments:True"
    for own in devices.ALLOCATOR_VARIABLES:
        monkeypatch.setattr(devices, "os", types.SimpleNamespace(environ={own: "max_split_size_mb:64"}))
        prepare_device("cuda", EngineConfig())
        assert {k: v for k, v in devices.os.environ.items() if "ALLOC" in k} == {own: "max_split_size_mb:64"}


@pytest.mark.usefixtures("two_gpus")
def test_a_worker_sets_up_its_device_before_it_asks_for_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name starts CUDA, which reads the settings of the allocator."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: str(dict(devices.os.environ)))
    setup: Any = types.SimpleNamespace(
        layers=(), dataset=None, device="cuda", config=types.SimpleNamespace(engine=EngineConfig())
    )
    assert "expandable_segments:True" in Worker(setup).device_name


def test_the_driver_learns_the_batch_of_a_worker_that_lost_its_device() -> None:
    class Failed(Exception):
        cause = DeviceLost("AcceleratorError: CUDA error: misaligned address", ("NVIDIA H100", 32))

    engine = object.__new__(RayEngine)
    engine.ray = types.SimpleNamespace(exceptions=types.SimpleNamespace(RayTaskError=Failed))
    error = engine._explained(Failed())
    assert error.lost and error.batch == ("NVIDIA H100", 32) and "misaligned address" in error.reason
    Failed.cause = ValueError("no")
    error = engine._explained(Failed())
    assert not error.lost and error.batch is None


def test_memory_is_freed_without_starting_cuda() -> None:
    before = dict(os.environ)
    free_memory()
    assert not torch.cuda.is_initialized() and dict(os.environ) == before
