"""The pass over dataset images, the grouping of its results, and what images of facets start from."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.config import DataConfig
from pipeline.data.datasets import list_dataset
from pipeline.examples import topk
from pipeline.facets import images
from pipeline.facets.grouping import group_units
from pipeline.facets.responses import ResponsesContext, ResponsesPart, measure_responses
from pipeline.facets.results import NEAREST
from pipeline.layers.selection import LayersConfig, list_layers
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model

REFERENCE = tuple(range(0, 40, 2))


@pytest.fixture
def context(tmp_path: Path) -> ResponsesContext:
    """Forty images of two colors and a network of two layers; image 7 cannot be read."""
    rng = np.random.default_rng(0)
    for number in range(40):
        color = np.array([200, 40, 40] if number % 3 else [40, 40, 200])
        pixels = np.clip(color + 30 * rng.standard_normal((16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number:02}.png")
    (tmp_path / "07.png").write_bytes(b"no image")
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 12, 3), torch.nn.ReLU()
    ).eval()
    model = Model(module, "made", Preprocessing((16, 16), 16, (0.5,) * 3, (0.25,) * 3), "0", ())
    layers = {layer.name: layer for layer in list_layers(model, LayersConfig(), None)}
    dataset = list_dataset(DataConfig("folder", str(tmp_path)))
    return ResponsesContext(model, [layers["0"]], [(1, 5)], [layers["2"]], REFERENCE, 6, dataset, 4)


def test_lists_and_responses_are_those_of_all_images(context: ResponsesContext) -> None:
    part = measure_responses(context, range(40))
    assert [index for index, _ in part.failed] == [7]
    loaded = images.load(context.dataset, range(40), context.model.preprocessing, 1)
    batch = torch.from_numpy(np.stack([loaded[i] for i in sorted(loaded)])).float() / 255
    with torch.no_grad():
        scaled = (batch - 0.5) / 0.25
        first = context.model.module[0](scaled)  # type: ignore[index]
        later = context.model.module(scaled).mean((2, 3)).numpy()
    means, numbers = first.mean((2, 3)).numpy()[:, [1, 5]], np.array(sorted(loaded))
    value, index = topk.decode(part.keys[0])
    for row in range(2):
        order = np.argsort(-means[:, row], kind="stable")[:6]
        assert index[row].tolist() == numbers[order].tolist()
        assert value[row] == pytest.approx(means[order, row], abs=1e-5)
    assert set(part.index) == (set(index.ravel()) | set(REFERENCE)) - {7}
    assert part.responses[0] == pytest.approx(later[np.searchsorted(numbers, part.index)], abs=1e-5)


@pytest.mark.parametrize("cuts", [(0, 40), (0, 8, 40), (0, 4, 16, 20, 40)])
def test_any_division_gives_the_same_facets(context: ResponsesContext, cuts: tuple[int, ...]) -> None:
    whole = ResponsesPart.merged([measure_responses(context, range(40))], 6, None)
    parts = [measure_responses(context, range(a, b)) for a, b in itertools.pairwise(cuts)]
    stored = [ResponsesPart.from_arrays(part.arrays()) for part in parts]
    first, second = (
        group_units(part, 0, (0, "2"), (1, 5), REFERENCE, 40, 0.1).arrays()
        for part in (whole, ResponsesPart.merged(stored, 6, None))
    )
    assert all(np.array_equal(first[name], second[name], equal_nan=True) for name in first)


def test_groups_have_their_examples_and_a_short_list_has_few(context: ResponsesContext) -> None:
    part = measure_responses(dataclasses.replace(context, count=50), range(40))
    found = group_units(ResponsesPart.merged([part], 50, None), 0, (0, "2"), (1, 5), REFERENCE, 40, 0.1)
    assert found.image.shape == (2, 50) and (found.image >= 0).sum(1).tolist() == [39, 39]
    assert ((found.facet >= 0) == (found.image >= 0)).all()
    assert found.count.sum() == found.facets == len(found.size) and found.size.sum() == 78
    for row, (unit, number) in enumerate(zip(found.unit, found.number, strict=True)):
        own = set(found.image[unit][found.facet[unit] == number])
        near = found.nearest[row][found.nearest[row] >= 0]
        assert set(near) <= own and len(near) == min(NEAREST, len(own))
        assert np.linalg.norm(found.center[row]) == pytest.approx(1, abs=1e-5)


def test_the_start_has_the_spectrum_and_the_color_of_the_images() -> None:
    rng = np.random.default_rng(3)
    waves = 127 + 100 * np.sin(2 * np.pi * 4 * np.arange(32) / 32 + rng.uniform(0, 6, (3, 1)))
    sources = [np.stack([np.tile(wave, (32, 1)), np.full((32, 32), 60.0), np.full((32, 32), 200.0)]) for wave in waves]
    start = images.mean_spectrum_image(sources, (32, 32), torch.Generator().manual_seed(1))
    assert start.shape == (3, 32, 32) and start.min() >= images.EDGE and start.max() <= 1 - images.EDGE
    assert start.mean((1, 2)) == pytest.approx(np.array([127, 60, 200]) / 255, abs=2e-3)
    power = torch.fft.rfft2(start[0] - start[0].mean()).abs()
    assert power.argmax() == 4 and power[0, 4] > 100 * power[1:].max()  # vertical waves of one frequency
    assert start[0].std() == pytest.approx(images.CONTRAST * 100 / 255 / 2**0.5, rel=0.02)
    assert start[1:].std(dim=(1, 2)).max() < 1e-4


def test_thumbnails_are_the_centers_of_the_images() -> None:
    wide = np.zeros((3, 8, 16), np.uint8)
    wide[:, :, 4:12] = 250
    found = images.thumbnails(np.array([[5, -1], [9, 5]]), {5: wide}, 4)
    assert found is not None and found.shape == (2, 2, 4, 4, 3)
    assert (found[0, 0] == 250).all() and (found[1, 1] == 250).all() and not found[0, 1].any() and not found[1, 0].any()
    assert images.thumbnails(np.array([[5]]), {5: wide}, 0) is None
