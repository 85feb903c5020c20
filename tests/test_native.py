"""Loops in C say what the same lines in PyTorch say, and where nothing compiles these lines run."""

import logging
import shutil

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
    [Adam(damping=0.03), Adam(beta1=0.5, beta2=0.9), Adam(damping=0.03, joint=True), NAdam(damping=0.1)],
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
    adam = Adam(lr=0.05)
    adam.step(parameters, torch.tensor([[1.0, -2.0, 3.0]]), adam.init_state(parameters), 0, 0.05)
    assert torch.allclose(parameters, torch.tensor([[0.05, -0.05, 0.05]]))


def test_without_a_compiler_there_is_no_library(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    build.load_library.cache_clear()
    with caplog.at_level(logging.INFO, logger="pipeline"):
        assert build.load_library("affine_sample") is None
    assert "affine_sample.c cannot be compiled" in caplog.text and "no-such-compiler" in caplog.text
    build.load_library.cache_clear()
