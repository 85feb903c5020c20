"""Rendering: a unit's picture follows from what the unit is, and its numbers from the saved picture."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import tiny_model
from torch import nn

from pipeline.core.seeds import seed_of
from pipeline.data import natural_spectrum
from pipeline.images import metrics
from pipeline.images.parameterizations import Fourier
from pipeline.images.transforms import Jitter, Rotate, Scale
from pipeline.layers.finding import Layer, ReceptiveField, capture, enumerate_layers
from pipeline.models.loading import Model
from pipeline.visualization.loop import render
from pipeline.visualization.objectives import Channel, Neuron, WholeLayer
from pipeline.visualization.optimizers import Adam
from pipeline.visualization.preset import Preset, canvas_size
from pipeline.visualization.render_job import RenderJob

PRESET = Preset(
    name="test",
    objective=Channel(),
    canvas=Fourier(decay=1.0),
    transforms=(Jitter(2), Scale(0.9, 1.1), Rotate(5)),
    optimizer=Adam(lr=0.1, beta1=0.9, beta2=0.99, damping=0.03, joint=False, warmup=2, floor=0.1, fall="cosine"),
    steps=24,
    size=32,
    margin=4,
)


@pytest.mark.parametrize("name", ["stem", "relu#2", "block.0", "head"])
def test_every_kind_of_layer_rises(tiny: Model, tiny_layers: dict[str, Layer], name: str) -> None:
    pictures = render(RenderJob(tiny, tiny_layers[name], PRESET, seed=0), [(0, 0), (1, 0), (2, 0)])
    for picture in pictures:
        assert picture.activation > picture.start and picture.status in ("converged", "limit")
        assert picture.image.shape == (32, 32, 3) and picture.image.dtype == np.uint8


def test_alone_and_in_a_batch_the_same_picture(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    preset = dataclasses.replace(PRESET, steps=64)
    layer = tiny_layers["late"]
    together = render(RenderJob(tiny, layer, preset, seed=3), [(c, v) for c in range(8) for v in range(2)])
    (alone,) = render(RenderJob(tiny, layer, preset, seed=3), [(5, 1)])
    twin = next(p for p in together if (p.channel, p.variant) == (5, 1))
    assert alone.seed == twin.seed
    assert np.abs(alone.image.astype(int) - twin.image.astype(int)).max() <= 1
    assert alone.trace[0] == pytest.approx(twin.trace[0], abs=1e-6)


def test_variants_and_run_seeds_differ(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    first, second = render(RenderJob(tiny, tiny_layers["late"], PRESET, seed=0), [(0, 0), (0, 1)])
    (other,) = render(RenderJob(tiny, tiny_layers["late"], PRESET, seed=1), [(0, 0)])
    assert len({first.seed, second.seed, other.seed}) == 3
    assert np.abs(first.image.astype(int) - second.image.astype(int)).max() > 10


def test_seeds_follow_from_identity() -> None:
    assert seed_of(0, "net", "layer", 3) == seed_of(0, "net", "layer", 3)
    # A separator keeps ("a", "bc") apart from ("ab", "c").
    assert len({seed_of("a", "bc"), seed_of("ab", "c"), seed_of("abc", "")}) == 3
    assert all(0 <= seed_of(i) < 2**63 for i in range(200))


def test_a_dead_unit_is_tried_again_and_then_marked() -> None:
    model = tiny_model()
    late = model.module.get_submodule("late")
    assert isinstance(late, nn.Conv2d) and late.bias is not None
    with torch.no_grad():
        late.weight[2].zero_()
    layer = next(la for la in enumerate_layers(model) if la.name == "late")
    dead, alive = render(RenderJob(model, layer, dataclasses.replace(PRESET, steps=8), seed=0), [(2, 0), (3, 0)])
    assert dead.status == "failed" and alive.status != "failed"
    (alone,) = render(RenderJob(model, layer, dataclasses.replace(PRESET, steps=8), seed=0), [(3, 0)])
    assert np.abs(alone.image.astype(int) - alive.image.astype(int)).max() <= 1


def test_a_picture_may_succeed_at_its_second_attempt(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    """A learning rate that throws the first attempt off is halved for the second."""
    calls = []

    @dataclasses.dataclass(frozen=True)
    class Unlucky(Adam):
        def step(self, parameters, gradient, state, at, rate):  # type: ignore[no-untyped-def]
            calls.append(rate)
            super().step(parameters, gradient * (float("nan") if rate == 0.1 else 1), state, at, rate)

    preset = dataclasses.replace(PRESET, optimizer=Unlucky(lr=0.1, warmup=0, floor=1.0), steps=8)
    (picture,) = render(RenderJob(tiny, tiny_layers["late"], preset, seed=0), [(0, 0)])
    assert picture.status == "retried" and set(calls) == {0.1, 0.05}
    assert picture.image.std() > 0


def test_the_network_is_left_as_it_was_found(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    before = {k: v.clone() for k, v in tiny.module.state_dict().items()}
    render(RenderJob(tiny, tiny_layers["head"], dataclasses.replace(PRESET, steps=2), seed=0), [(0, 0)])
    assert all(torch.equal(v, before[k]) for k, v in tiny.module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.module.modules())
    assert all(p.grad is None for p in tiny.module.parameters())


def test_a_finished_picture_is_measured_as_saved(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    layer = tiny_layers["late"]
    pictures = render(RenderJob(tiny, layer, PRESET, seed=3), [(c, v) for c in range(8) for v in range(2)])
    images = torch.from_numpy(np.stack([p.image for p in pictures])).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad(), capture(tiny, [layer]) as forward:
        maps = forward(images)[layer.name]
    expected = metrics.image_metrics(images, (2, 4), natural_spectrum.packaged_spectrum())
    for i, picture in enumerate(pictures):
        own = maps[i].mean((1, 2))
        assert picture.activation == pytest.approx(float(own[picture.channel]), abs=1e-4)
        assert picture.measures["spatial_mean"] == pytest.approx(picture.activation, abs=1e-4)
        assert picture.measures["peak"] == pytest.approx(float(maps[i, picture.channel].max()), abs=1e-4)
        assert picture.response == pytest.approx(maps[i].amax((1, 2)).numpy(), rel=2e-3, abs=1e-3)
        assert {k: float(v[i]) for k, v in expected.items()}.items() <= picture.measures.items()


def test_peaks_follow_what_is_raised(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    layer = tiny_layers["late"]
    negative = dataclasses.replace(PRESET, negative=True)
    neuron = dataclasses.replace(PRESET, objective=Neuron())
    for preset, by in ((negative, lambda m: m.amin((1, 2))), (neuron, lambda m: m.amax((1, 2)))):
        for picture in render(RenderJob(tiny, layer, preset, seed=0), [(c, 0) for c in range(8)]):
            image = torch.from_numpy(picture.image).permute(2, 0, 1)[None].float() / 255
            with torch.no_grad(), capture(tiny, [layer]) as forward:
                peaks = by(forward(image)[layer.name][0])
            assert picture.measures["peak"] == pytest.approx(float(peaks[picture.channel]), abs=1e-4)
    (whole,) = render(
        RenderJob(tiny, layer, dataclasses.replace(PRESET, objective=WholeLayer(), steps=2), seed=0), [(0, 0)]
    )
    assert np.isnan(whole.measures["peak"]) and np.isnan(whole.measures["spatial_mean"])


def test_canvas_follows_the_layer(tiny_layers: dict[str, Layer]) -> None:
    def sized(**changes: object) -> tuple[int, int]:
        return canvas_size(dataclasses.replace(tiny_layers["late"], **changes), (224, 224), "auto")  # type: ignore[arg-type]

    def field(side: int) -> ReceptiveField:
        return ReceptiveField((side, side), (8, 8), (0, 0))

    assert [sized(field=field(side))[0] for side in (7, 128, 129, 161, 851)] == [128, 128, 160, 192, 192]
    assert sized(field=None, height=14, width=14) == (128, 128)
    assert sized(field=None, height=7, width=7) == (192, 192)
    assert sized(layout="vector", height=1, width=1) == (224, 224)
    assert canvas_size(tiny_layers["late"], (32, 32), "auto") == (32, 32)
    assert canvas_size(tiny_layers["late"], (224, 224), 64) == (64, 64)
