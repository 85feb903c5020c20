"""Silent units start from an image with every parameterization, and say what came of it."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import compose, tiny_model
from test_render import PRESET
from torch import nn

from pipeline.core.config_files import load_config_files
from pipeline.images.parameterizations import Fourier, Laplacian, Maco, Parameterization, Pixel
from pipeline.layers.finding import Layer, enumerate_layers
from pipeline.models.loading import Model
from pipeline.visualization.batch import Batch
from pipeline.visualization.evaluation import SILENT
from pipeline.visualization.loop import restart
from pipeline.visualization.render_job import RenderJob, draw_start

SIDE = 40
IMAGE = torch.nn.functional.interpolate(
    torch.rand(1, 3, 7, 7, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1, (SIDE, SIDE), mode="bilinear"
)[0]
UNITS = [(1, 0), (1, 1)]


@pytest.mark.parametrize("canvas", [Pixel(), Pixel(clip=True, mean=0.7), Fourier(), Laplacian(), Maco()])
def test_every_parameterization_starts_from_the_image(
    tiny: Model, tiny_layers: dict[str, Layer], canvas: Parameterization
) -> None:
    preset = load_config_files(dataclasses.replace(PRESET, canvas=canvas), "render")
    job = RenderJob(tiny, tiny_layers["late"], preset, 0, initial_images=dict.fromkeys(UNITS, IMAGE))
    start = preset.canvas.image(Batch(job, draw_start(job, UNITS, 3)).parameters.detach(), (SIDE, SIDE))
    if isinstance(canvas, Maco):  # keeps the phases and has its own amplitudes; noise has a correlation of 0
        assert np.corrcoef(start[0].flatten(), IMAGE.flatten())[0, 1] > 0.3
    else:
        assert (start - IMAGE).abs().max() < 1e-3
    assert torch.equal(start[0], start[1])


def test_a_restart_says_so_or_why_not() -> None:
    model = tiny_model()
    late = model.module.get_submodule("late")
    assert isinstance(late, nn.Conv2d)
    with torch.no_grad():
        late.weight[2].zero_()
    layer = next(layer for layer in enumerate_layers(model) if layer.name == "late")
    units = [(1, 0), (2, 0)]
    job = RenderJob(model, layer, PRESET, 0, initial_images=dict.fromkeys(units, IMAGE))
    alive, dead = restart(job, units)
    assert alive.status == "restarted" and alive.activation > alive.start
    assert alive.reason == "started from its best dataset example after 3 silent attempts"
    assert dead.status == "failed" and dead.reason == f"{SILENT}; from its best dataset example: {SILENT}"


def test_presets_that_set_their_own_start_or_minimize_do_not_restart() -> None:
    presets = {
        name: compose([f"render={name}"]).config.render for name in ("distill", "maco", "image_prior", "negative")
    }
    assert {name: preset.can_restart for name, preset in presets.items()} == {
        "distill": True,
        "maco": True,
        "image_prior": False,
        "negative": False,
    }
