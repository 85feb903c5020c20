"""The transparency mask of every visualization: what it sums, and that it changes nothing else."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose
from torch import nn

from pipeline.core.config_files import load_config_files
from pipeline.images.gradient_preconditioners import Normalise
from pipeline.images.image_regularizers import TotalVariation
from pipeline.images.parameterizations import FromImage, Maco, Parameterization, Pixel
from pipeline.images.transforms import Jitter
from pipeline.images.transparency import to_mask
from pipeline.layers.finding import Layer, enumerate_layers
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, prepare_module, weights_digest
from pipeline.visualization import step
from pipeline.visualization.evaluation import Visualization
from pipeline.visualization.loop import render
from pipeline.visualization.objectives import Channel
from pipeline.visualization.optimizers import Adam
from pipeline.visualization.preset import Preset
from pipeline.visualization.render_job import RenderJob
from pipeline.visualization.schedules import Plateau, Stage

PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf" / "render").glob("*.yaml"))
SIZE = 32
PRESET = Preset(
    name="test",
    objective=Channel(),
    canvas=Pixel(),
    transforms=(),
    optimizer=Adam(lr=0.05, beta1=0.9, beta2=0.99, damping=0.03, joint=False, warmup=2, floor=0.1, fall="cosine"),
    steps=6,
    size=SIZE,
    margin=4,
    attempts=1,
)


class Weighted(nn.Module):
    """A linear network whose gradient is known: each pixel times its weight, then a convolution of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        ramp = torch.linspace(-2, 1, SIZE)
        self.register_buffer("weight", ramp[:, None] * torch.linspace(0.2, 1, SIZE))
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = nn.functional.interpolate(self.weight[None, None], x.shape[-2:], mode="bilinear")
        return self.conv(x * weight)


@pytest.fixture(scope="module")
def weighted() -> tuple[Model, Layer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Weighted()
    recipe = Preprocessing((SIZE, SIZE), SIZE, (0.5,) * 3, (0.25,) * 3)
    model = Model(prepare_module(module), "weighted", recipe, weights_digest(module), ())
    return model, next(layer for layer in enumerate_layers(model) if layer.name == "conv")


def rendered(found: tuple[Model, Layer], preset: Preset, units: Sequence[int] = (0, 1)) -> list[Visualization]:
    return render(RenderJob(*found, preset, seed=0), [(channel, 0) for channel in units])


def expected(found: tuple[Model, Layer]) -> np.ndarray:
    weight = found[0].module.get_buffer("weight")
    return to_mask(weight.abs()[None])[0].numpy()


def test_the_mask_of_a_linear_network_is_its_weight(weighted: tuple[Model, Layer]) -> None:
    for picture in rendered(weighted, PRESET):
        assert picture.mask.shape == (SIZE, SIZE) and picture.mask.dtype == np.uint8
        # A pixel on the border between two levels may fall on either side.
        difference = np.abs(picture.mask.astype(int) - expected(weighted))
        assert difference.max() <= 9 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize("canvas", [Maco(spectrum=load_config_files(Maco(), "x").spectrum), FromImage(decay=1.2)])
def test_it_is_independent_of_the_parameterization(weighted: tuple[Model, Layer], canvas: Parameterization) -> None:
    job = RenderJob(
        *weighted, dataclasses.replace(PRESET, canvas=canvas), 0, initial_images={(0, 0): torch.full((3, 40, 40), 0.4)}
    )
    (picture,) = render(job, [(0, 0)])
    assert (picture.mask != expected(weighted)).mean() < 0.01


def test_regularizers_and_preconditioners_are_no_part_of_it(weighted: tuple[Model, Layer]) -> None:
    changed = dataclasses.replace(PRESET, penalties=(TotalVariation(weight=5.0),), preconditioners=(Normalise(),))
    for plain, other in zip(rendered(weighted, PRESET), rendered(weighted, changed), strict=True):
        assert not np.array_equal(plain.image, other.image)
        assert (plain.mask != other.mask).mean() < 0.01


def test_random_shifts_come_back_to_their_pixels(weighted: tuple[Model, Layer]) -> None:
    """Shifts by up to 2 pixels blur the weights by as much, and by no more: the gradient arrives where the pixel is."""
    jittered = dataclasses.replace(PRESET, transforms=(Jitter(2),), steps=24)
    (picture,) = rendered(weighted, jittered, [0])
    inner = (slice(4, -4), slice(4, -4))
    difference = picture.mask[inner].astype(int) - expected(weighted)[inner]
    assert (
        np.abs(difference).max() < 45
        and np.corrcoef(picture.mask[inner].ravel(), expected(weighted)[inner].ravel())[0, 1] > 0.98
    )


def test_stages_of_several_sizes_count_by_area(weighted: tuple[Model, Layer]) -> None:
    """The gradient in a pixel is four times as large where pixels have four times the area."""
    growing = (Stage(share=0.5, canvas=0.5), Stage(share=0.5))
    (picture,) = rendered(weighted, dataclasses.replace(PRESET, schedule=growing), [0])
    assert picture.mask.shape == (SIZE, SIZE)
    inner = (slice(2, -2), slice(2, -2))  # interpolation differs at the edges
    assert np.abs(picture.mask[inner].astype(int) - expected(weighted)[inner]).max() <= 20


def test_images_that_stop_early_keep_their_own(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    stopping = dataclasses.replace(PRESET, steps=40, stop=Plateau(patience=4, tolerance=0.16, least=8))
    found = (tiny, tiny_layers["late"])
    together = rendered(found, stopping, range(8))
    steps = [picture.steps for picture in together]
    assert min(steps) < max(steps)  # some leave the batch before others
    for channel in (int(np.argmin(steps)), int(np.argmax(steps))):
        (alone,) = rendered(found, stopping, [channel])
        assert alone.steps == steps[channel]
        assert np.abs(alone.mask.astype(int) - together[channel].mask).max() <= 17  # two levels


@pytest.mark.parametrize("name", PRESETS)
def test_no_pixel_of_any_preset_changes(
    name: str, tiny: Model, tiny_layers: dict[str, Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config_files(compose([f"render={name}"]).config.render, "render")
    # Heads are of another network, and the diversity of other layers.
    stages = tuple(dataclasses.replace(stage, layer=None) for stage in config.schedule)
    margin = min(config.margin, 4)
    preset = dataclasses.replace(config, steps=4, size=SIZE, margin=margin, schedule=stages, attempts=1)
    units = [(1, variant) for variant in range(preset.variants)]
    side = SIZE + 2 * preset.margin
    images = {unit: torch.rand(3, side, side, generator=torch.Generator().manual_seed(1)) for unit in units}
    job = RenderJob(tiny, tiny_layers["late"], preset, 0, initial_images=images, layer_mean=torch.ones(8))
    with_mask = render(job, units)
    monkeypatch.setattr(step, "gradient_magnitude", lambda gradient, size: torch.zeros(()))
    for one, other in zip(with_mask, render(job, units), strict=True):
        assert np.array_equal(one.image, other.image) and one.activation == other.activation
        assert one.mask.any() and not other.mask.any()
