"""Images that use a unit, and the pixels it uses: made networks where both are known."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from test_measurement import model_of
from torch import Tensor, nn

from pipeline.data import image_loading
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Dataset, list_dataset
from pipeline.effects import relevance
from pipeline.effects.measurement import EffectsContext, measure
from pipeline.effects.relevance import (
    MASK_SIDE,
    RelevanceContext,
    RelevanceIndex,
    blurred,
    measure_relevance,
    select_relevant,
)
from pipeline.examples.sweep import ExamplesConfig
from pipeline.layers.finding import enumerate_layers
from pipeline.models.loading import Model

SIDE = 56


class TwoPatches(nn.Module):
    """Unit 0 sees red and unit 1 green; the first output needs red, the second one green, which unit 1 inhibits twice.

    Both units respond to a bright patch of their color. Red raises output 0, green lowers output 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.conv.weight.zero_(), self.head.weight.zero_()
            self.conv.weight[0, 0] = self.conv.weight[1, 1] = 1
            self.conv.bias.fill_(-0.5)
            self.head.weight[0, 0], self.head.weight[1, 1] = 4, -2
            self.head.bias.copy_(torch.tensor([0.0, -10.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture
def patches(tmp_path: Path) -> Dataset:
    """Six dark images: red patches of growing size at the top left, then green ones at the bottom right."""
    for i in range(6):
        pixels = np.full((SIDE, SIDE, 3), 20, np.uint8)
        size = 8 * (i % 3 + 1)
        if i < 3:
            pixels[4 : 4 + size, 4 : 4 + size, 0] = 255
        else:
            pixels[-4 - size : -4, -4 - size : -4, 1] = 255
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    return list_dataset(DataConfig(source="folder", root=str(tmp_path)), 3)


def context_of(model: Model, dataset: Dataset, outputs: str) -> RelevanceContext:
    layers = [layer for layer in enumerate_layers(model) if layer.name not in (outputs, "output")]
    by_name = {layer.name: layer for layer in enumerate_layers(model)}
    return RelevanceContext(model, layers, by_name[outputs], dataset, ExamplesConfig(side=32))


def relevance_of(context: RelevanceContext, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Relevance of all units of the first layer, (C, n), and the largest outputs, (n,)."""
    means = [np.zeros(layer.channels, np.float32) for layer in context.layers]
    none = [()] * len(context.layers)
    part = measure(
        EffectsContext(context.model, context.layers, context.outputs, means, none, context.dataset, 4), range(count)
    )
    return part.relevance[:, : context.layers[0].channels].T, part.top


def test_the_images_that_use_a_unit_and_their_pixels(patches: Dataset) -> None:
    context = context_of(model_of(TwoPatches(), SIDE), patches, "head")
    values, top = relevance_of(context, 6)
    value, index = select_relevant(values, np.arange(6, dtype=np.int32), 3)
    # Green has as high activations as red, but only lowers an output that is never the largest.
    assert top.tolist() == [0] * 6
    assert index.tolist() == [[2, 1, 0], [-1, -1, -1]]
    # The network is linear where it is active: relevance is the unit's part of the logit.
    share = 4 * np.array([24, 16, 8]) ** 2 / SIDE**2 * ((1 - 0.5) / 0.25 - 0.5)
    np.testing.assert_allclose(value[0], share, rtol=1e-5)
    chosen = RelevanceIndex.of([np.arange(2)], [index], np.array([1]))
    arrays = measure_relevance(context, chosen, chosen.images.tolist())
    assert arrays["0/pairs"].tolist() == [[0, 0], [1, 0], [2, 0]]
    assert arrays["shown/index"].tolist() == [0, 2]  # the atlas has image 1 already
    for (image, _), place, mask in zip(arrays["0/pairs"].tolist(), arrays["0/place"], arrays["0/mask"], strict=True):
        end = 4 + 8 * (image + 1)
        assert mask.shape == (MASK_SIDE, MASK_SIDE) and mask.max() == 255
        assert ((place >= 4) & (place < end)).all()
        inside = mask[2 : end // 2, 2 : end // 2].astype(int).sum()
        assert inside / mask.astype(int).sum() > 0.7  # the smoothing reaches one cell beyond the patch


def test_shares_of_pixels_add_up(patches: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integrated gradients: the shares of all pixels are the change of the response from the blurred image."""
    context = context_of(model_of(TwoPatches(), SIDE), patches, "head")
    shares: list[Tensor] = []
    finished = relevance._mask

    def recording(share: Tensor, size: tuple[int, int]) -> np.ndarray:
        shares.append(share.detach())
        return finished(share, size)

    monkeypatch.setattr(relevance, "STEPS", 200)
    monkeypatch.setattr(relevance, "_mask", recording)
    index = RelevanceIndex.of([np.arange(2)], [np.array([[0, 1, 2], [-1, -1, -1]])], np.zeros(0, int))
    measure_relevance(context, index, [0, 1, 2])
    loaded = image_loading.load_images(patches, range(3), context.model.preprocessing)
    for item, share in zip(loaded, shares, strict=True):
        assert item.array is not None
        image = torch.from_numpy(item.array)[None].float() / 255
        responses = [torch.relu(4 * (x[:, 0] - 0.5) - 0.5) * 4 / SIDE**2 for x in (image, blurred(image))]
        used = responses[0] > 0  # elsewhere the unit has no relevance in this image
        change = (responses[0] - responses[1])[used].sum()
        assert float(share.sum()) == pytest.approx(float(change), rel=0.01) and change > 0


def test_a_unit_that_needs_no_details_has_an_empty_mask(patches: Dataset) -> None:
    """With a large bias, the red unit responds to a blurred image as much: no pixels in particular."""
    module = TwoPatches()
    with torch.no_grad():
        module.conv.bias.fill_(30)
    for network, empty in ((TwoPatches(), False), (module, True)):
        context = context_of(model_of(network, SIDE), patches, "head")
        index = RelevanceIndex.of([np.arange(1)], [np.array([[0, 1, 2]])], np.zeros(0, int))
        arrays = measure_relevance(context, index, [0, 1, 2])
        assert (arrays["0/mask"].reshape(3, -1).max(1) == (0 if empty else 255)).all()


def test_any_division_gives_the_same_bytes(photo_folder: Path) -> None:
    dataset = list_dataset(DataConfig(source="folder", root=str(photo_folder)), 3)
    context = context_of(tiny_model(), dataset, "head")
    channels = [np.arange(0, layer.channels, 2) for layer in context.layers]
    rng = np.random.default_rng(0)
    lists = [rng.choice(6, (len(own), 2), replace=True) for own in channels]
    index = RelevanceIndex.of(channels, lists, np.zeros(0, int))
    assert RelevanceIndex.from_arrays(index.arrays()).arrays().keys() == index.arrays().keys()
    whole = measure_relevance(context, index, index.images.tolist())
    cuts = [0, 1, 4, len(index.images)]
    parts = []
    for start, end in itertools.pairwise(cuts):
        images = index.images[start:end].tolist()
        parts.append(measure_relevance(context, index.for_images(images[0], images[-1]), images))
    for name, array in whole.items():
        if not name.endswith("offset"):
            assert np.concatenate([part[name] for part in parts]).tobytes() == array.tobytes(), name


def test_lists_by_relevance() -> None:
    images = np.array([3, 5, 9], np.int32)
    values = np.array([[1, 3, 2], [-1, 0, 4], [np.nan] * 3, [2, 2, 2]], np.float32)
    value, index = select_relevant(values, images, 2)
    assert index.tolist() == [[5, 9], [9, -1], [-1, -1], [3, 5]]  # of equal ones the first
    np.testing.assert_array_equal(value, np.array([[3, 2], [4, np.nan], [np.nan] * 2, [2, 2]], np.float32))
    value, index = select_relevant(values, images, 5)
    assert index.shape == (4, 5) and index[0].tolist() == [5, 9, 3, -1, -1]
    value, index = select_relevant(values[:, :0], images[:0], 2)
    assert index.tolist() == [[-1, -1]] * 4 and np.isnan(value).all()
