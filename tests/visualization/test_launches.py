"""What optimization steps would launch on a GPU, counted without one: no waiting for the device, no copies from it."""

import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose, tiny_model

from pipeline.acceleration.redirected_relu import REDIRECTED_STEPS
from pipeline.core.config_files import load_config_files
from pipeline.visualization.loop import render
from pipeline.visualization.preset import Preset
from pipeline.visualization.render_job import RenderJob

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "benches"))

from gpu_blocks.launches import Complete, Launches, recorded, rendering_job, step_launches

PRESETS = [
    "accentuate",
    "best",
    "blur_gradient",
    "blur_image",
    "caricature",
    "decorrelated_only",
    "distill",
    "diverse",
    "fast",
    "image_prior",
    "lucid",
    "maco",
    "naive",
    "natural",
    "negative",
    "neuron",
    "oygard",
    "robust_only",
    "tv",
    "weight_noise",
]

# The step whose launches are counted, of so many.
COUNTED, STEPS = REDIRECTED_STEPS + 2, REDIRECTED_STEPS + 6


def preset_of(*overrides: str) -> Preset:
    """Return a preset whose rendering has a steady step, with its files."""
    render_overrides = [f"render.steps={STEPS}", "render.size=32", *overrides]
    return load_config_files(compose(render_overrides).config.render, "render")


def _launches(job: RenderJob, step: int = COUNTED, answer: Callable[[str], Any] = lambda place: False) -> Launches:
    return step_launches(job, step, answer)


def _on_device(preset: Preset, layer: str = "late") -> RenderJob:
    return rendering_job(tiny_model(), preset, layer, device="meta")


@pytest.mark.parametrize("name", PRESETS)
def test_a_steady_step_neither_waits_for_the_device_nor_copies(name: str) -> None:
    found = _launches(_on_device(preset_of(f"render={name}"), "head" if name == "oygard" else "late"))
    assert not found.mixed and not found.transfers
    # Noise on the weights is drawn on the CPU, so that all devices have the same; its copies are not waited for.
    assert bool(found.uploads) == (name == "weight_noise")


OPTIONS = {
    "crops": ["render/transforms=crops"],
    "robustness": ["render/transforms=robustness"],
    "window": ["render/transforms=window"],
    "laplacian": ["render/canvas=laplacian"],
    "pixel": ["render/canvas=pixel", "render.canvas.clip=true"],
    "regularizers": ["render/penalties=[tv,l1,l2,lp,blur,high_frequency]"],
    "preconditioners": ["render/preconditioners=[blur,spectrum,normalise]"],
    "coarse to fine": ["render/schedule=coarse_to_fine"],
    "adamw": ["render/optimizer=adamw"],
    "nadam": ["render/optimizer=nadam"],
    "sgd": ["render/optimizer=sgd"],
    "plateau": ["render/stop=plateau"],
    "joint": ["render/objective=joint", "render.objective.with_units=[block.0:1]"],
    "layer": ["render/objective=layer"],
    "interpolate": ["render/objective=interpolate", "render.objective.to=late:3", "render.variants=2",
                    "render/couplings=[alignment]"],
    "energy": ["render/objective=energy"],
    "rectified": ["render/objective=rectified"],
    "normalizations": ["render/network_penalties=[normalization]"],
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_of_a_preset_makes_a_step_wait(name: str) -> None:
    found = _launches(_on_device(preset_of(*OPTIONS[name])))
    assert not found.mixed and not found.transfers and not found.uploads


def test_masks_of_dropout_are_copied_without_waiting() -> None:
    found = _launches(_on_device(preset_of("render/augmentations=[dropout]")))
    assert not found.mixed and not found.transfers and found.uploads


def test_directions_are_read_and_copied_once(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.eye(8, dtype=np.float32))
    preset = preset_of("render/objective=direction", f"render.objective.vectors={tmp_path / 'vectors.npy'}")
    found = _launches(_on_device(preset))
    assert not found.mixed and not found.transfers and not found.uploads


@pytest.mark.parametrize("silent", [False, True])
def test_one_number_is_read_in_each_of_the_first_steps(silent: bool) -> None:
    """Whether any image is without gradient; the second pass with redirected gradients reads nothing."""
    first, second = (
        _launches(_on_device(preset_of(f"render={name}")), 3, lambda place: silent) for name in ("distill", "diverse")
    )
    for found in (first, second):
        assert [kind for kind, _ in found.transfers] == ["scalar read"] and not found.mixed and not found.uploads
    steady = _launches(_on_device(preset_of()))
    assert (sum(first.kernels.values()) > 1.5 * sum(steady.kernels.values())) == silent


def test_the_recorder_sees_what_makes_a_host_wait() -> None:
    x, mask = torch.zeros(3, device="meta"), torch.ones(3, device="meta", dtype=torch.bool)
    waits: dict[str, Callable[[], object]] = {
        "scalar read": lambda: bool(x.sum() > 0),
        "device to host": lambda: x.cpu(),
        "host to device": lambda: torch.zeros(2).to("meta"),
        "numbers to device": lambda: x.new_tensor([1.0, 2.0]),
        "index": lambda: x[mask],
    }
    for kind, work in waits.items():
        with recorded() as found:
            work()
        assert [seen for seen, _ in found.transfers] == [kind]
    with recorded() as found, pytest.raises(RuntimeError):
        _ = x + torch.zeros(3)
    assert found.mixed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PRESETS)
def test_on_a_gpu_no_steady_step_waits(name: str) -> None:
    """PyTorch raises an error at each wait."""
    job = rendering_job(
        tiny_model(), preset_of(f"render={name}"), "head" if name == "oygard" else "late", device="cuda"
    )
    steps = itertools.count()

    def on_step() -> None:
        at = next(steps)
        if at == COUNTED:
            torch.cuda.set_sync_debug_mode("error")
        if at == COUNTED + 1:
            raise Complete

    try:
        with pytest.raises(Complete):
            units = [(c, v) for c in range(2) for v in range(job.preset.variants)]
            render(dataclasses.replace(job, on_step=on_step), units)
    finally:
        torch.cuda.set_sync_debug_mode("default")
