"""Loops in C say what the same lines in PyTorch say, and where nothing compiles these lines run."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.kernels import affine_sample, build
from pipeline.kernels.affine_sample import sample, sample_with_pytorch
from pipeline.visualization import optimizers
from pipeline.visualization.optimizers import Adam, NAdam

compiled = pytest.mark.skipif(shutil.which("cc") is None, reason="no compiler here")


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "_adam", lambda: None)
    monkeypatch.setattr(affine_sample, "_loop", lambda: None)


@compiled
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 9999),
    picture=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    view=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    channels=st.integers(1, affine_sample.MAX_CHANNELS + 1),
)
def test_any_matrix_shows_what_grid_sample_shows(
    seed: int, picture: tuple[int, int], view: tuple[int, int], channels: int
) -> None:
    """Also far beyond the edge, where the picture is reflected many times."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, channels, *picture, generator=generator)
    # In quarters of pixels, away from where the next rounding decides between two of them.
    turn = torch.randint(-8, 9, (2, 3, 3), generator=generator) / 4 + 0.03
    matrix = torch.where(torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0]]) > 0, turn, turn * 16)
    matrix[:, 2] = torch.tensor([0.0, 0.0, 1.0])
    assert affine_sample._loop() is not None
    noise = torch.randn(2, channels, *view, generator=generator)
    seen: list[tuple[Tensor, Tensor]] = []
    for function in (sample, sample_with_pytorch):
        own = images.clone().requires_grad_(True)
        found = function(own, matrix, view)
        seen.append((found.detach(), torch.autograd.grad((found * noise).sum(), own)[0]))
    for mine, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-3)


def test_a_view_wider_than_a_row_is_sampled_by_the_grid() -> None:
    images = torch.rand(1, 1, 2, 3)
    assert sample(images, torch.eye(3)[None], (2, affine_sample.MAX_WIDTH + 1)).shape == (
        1,
        1,
        2,
        affine_sample.MAX_WIDTH + 1,
    )


@compiled
@pytest.mark.parametrize(
    "optimizer",
    [Adam(joint=False), Adam(beta1=0.9, beta2=0.999, damping=0.0, joint=False), Adam(), NAdam(damping=0.1)],
    ids=str,
)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 5), (2, 3, 40, 51), (2, 3, 47, 31, 2)], ids=str)
def test_one_step_of_adam_is_the_same_in_c(
    optimizer: Adam, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def walked() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        parameters = torch.zeros(shape)
        state = optimizer.init_state(parameters, paired=shape[-1] == 2)
        for at in range(6):
            gradient = torch.randn(shape, generator=generator) * 10.0 ** (at - 3)
            optimizer.step(parameters, gradient, state, at, 0.1)
        return parameters

    assert optimizers._adam() is not None
    fast = walked()
    monkeypatch.setattr(optimizers, "_adam", lambda: None)
    torch.testing.assert_close(fast, walked(), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("uncompiled")
def test_the_lines_beside_them_are_whole() -> None:
    images = torch.rand(1, 2, 5, 5)
    assert torch.allclose(sample(images, torch.eye(3)[None], (5, 5)), images, atol=1e-6)
    parameters = torch.zeros(1, 3)
    adam = Adam(damping=0.0)
    adam.step(parameters, torch.tensor([[1.0, -2.0, 3.0]]), adam.init_state(parameters), 0, 0.05)
    assert torch.allclose(parameters, torch.tensor([[0.05, -0.05, 0.05]]))


# ----------------------------------------------------------------- compilation

COMPILE = """
import subprocess
from pipeline.kernels import build
run, compiled = subprocess.run, []
def count(arguments, **options):
    compiled.extend(a for a in arguments if a == "-shared")
    return run(arguments, **options)
subprocess.run = count
assert build.load_library("adam") is not None
print(len(compiled))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and a process that has compiled nothing and logged no failure."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "_failed", set())
    build.load_library.cache_clear()
    yield tmp_path / "neuron-atlas" / "kernels"
    build.load_library.cache_clear()


@pytest.fixture
def compiled_sources(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the loops that are compiled from now on."""
    names: list[str] = []
    compile_source = build._compile

    def count(command: Sequence[str], source: Path, folder: Path) -> Path:
        names.append(source.stem)
        return compile_source(command, source, folder)

    monkeypatch.setattr(build, "_compile", count)
    return names


def reload(name: str = "adam", fused: bool = False) -> object:
    build.load_library.cache_clear()
    return build.load_library(name, fused)


@compiled
def test_a_second_process_compiles_nothing(cache: Path) -> None:
    counts = [
        subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=True).stdout.strip()
        for _ in range(2)
    ]
    assert counts == ["1", "0"]
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and cache.stat().st_mode & 0o777 == 0o700


@compiled
def test_two_processes_compile_at_once(cache: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", COMPILE]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert all(build._digest(file) in file.name for file in cache.iterdir())


@compiled
def test_the_compiler_may_have_arguments(
    cache: Path, compiled_sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in ("cc", "cc -O2", "env 'cc'", " "):
        monkeypatch.setenv("CC", command)
        assert reload() is not None
    assert compiled_sources == ["adam"] * 3 and len(list(cache.glob("adam-*.so"))) >= 1
    assert reload(fused=True) is not None and len(compiled_sources) == 4


@compiled
def test_a_library_is_compiled_again_for_another_source_compiler_or_processor(
    cache: Path, compiled_sources: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reload() is not None and reload() is not None and len(compiled_sources) == 1
    for name, value in (("_version", lambda _: "2.0"), ("_cpu", lambda: ["another"])):
        monkeypatch.setattr(build, name, value)
        assert reload() is not None
    assert len(compiled_sources) == 3


@compiled
@pytest.mark.parametrize("damage", ["truncated", "writable by others", "of another user", "a link"])
def test_a_damaged_or_foreign_library_is_not_loaded(
    cache: Path, compiled_sources: list[str], damage: str, tmp_path: Path
) -> None:
    assert reload() is not None
    (file,) = cache.iterdir()
    if damage == "truncated":
        content = file.read_bytes()
        file.unlink()  # this process has it mapped
        file.write_bytes(content[: len(content) // 2])
    elif damage == "writable by others":
        file.chmod(0o666)
    elif damage == "of another user":
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        os.chown(file, 12345, -1)
    else:
        file.symlink_to(file.rename(tmp_path / "elsewhere.so"))
    assert reload() is not None and len(compiled_sources) == 2
    assert reload() is not None and len(compiled_sources) == 2
    assert not file.is_symlink() and file.stat().st_uid == os.geteuid() and file.stat().st_mode & 0o777 == 0o600


@compiled
@pytest.mark.parametrize("problem", ["a file", "writable by others", "of another user"])
def test_without_a_cache_folder_every_process_compiles(
    cache: Path, compiled_sources: list[str], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.mkdir()
    if problem == "a file":
        cache.write_text("")
    else:
        cache.mkdir()
        cache.chmod(0o777 if problem == "writable by others" else 0o700)
        if problem == "of another user":
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
    for count in (1, 2):
        assert reload() is not None and len(compiled_sources) == count
    assert not list(cache.parent.rglob("*.so"))


def test_a_missing_compiler_is_one_warning(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.INFO, logger="pipeline"):
        assert build.load_library("affine_sample") is None and build.load_library("adam") is None
    assert "affine_sample.c cannot be compiled" in caplog.text and "no-such-compiler" in caplog.text
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "apt install gcc" in warning.getMessage()


@compiled
@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("cc --no-such-option", "no-such-option"),
        ("sh -c 'echo >&2; exit 3'", "exit status 3"),  # says nothing but a line break
        ("cc 'open", "No closing quotation"),
    ],
)
def test_a_failing_compiler_is_one_warning(
    cache: Path, command: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", command)
    with caplog.at_level(logging.WARNING, logger="pipeline"):
        assert build.load_library("adam") is None and build.load_library("spatial_stats") is None
    (record,) = caplog.records
    assert reason in record.getMessage()
