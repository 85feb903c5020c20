"""Samples of activations: what is read where, and the same bytes in any division."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose, tiny_model
from PIL import Image
from test_measurement import images_of, model_of
from torch import Tensor, nn

from pipeline.activation_atlas.config import ActivationAtlasConfig
from pipeline.activation_atlas.request import request_activation_atlas
from pipeline.activation_atlas.results import SamplesPart
from pipeline.activation_atlas.sampling import SamplingContext, choose_positions, sample
from pipeline.core.errors import AtlasError
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Dataset, list_dataset
from pipeline.layers.finding import capture, enumerate_layers
from pipeline.models.loading import Model


@pytest.fixture
def dataset(photo_folder: Path) -> Dataset:
    return list_dataset(DataConfig(source="folder", root=str(photo_folder)), 3)


def context_of(
    model: Model, dataset: Dataset, names: list[str], outputs: str | None, positions: int
) -> SamplingContext:
    layers = {layer.name: layer for layer in enumerate_layers(model)}
    chosen = [layers[name] for name in names]
    return SamplingContext(model, chosen, layers[outputs] if outputs else None, dataset, positions, 0, batch=4)


class Tokens(nn.Module):
    """Patches as tokens (B, N, C), and a head over their mean, without an activation function."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.mix(tokens).mean(1))


def test_positions_depend_on_image_layer_and_seed_and_differ_from_each_other() -> None:
    one = choose_positions(0, "a.png", "late", (5, 7), 4)
    assert len(set(one.tolist())) == 4 and one.max() < 35
    assert np.array_equal(one, choose_positions(0, "a.png", "late", (5, 7), 4))
    assert np.array_equal(one[:2], choose_positions(0, "a.png", "late", (5, 7), 2))
    others = [
        choose_positions(*changed, (5, 7), 4) for changed in ((1, "a.png", "late"), (0, "b", "late"), (0, "a.png", "x"))
    ]
    assert not any(np.array_equal(one, other) for other in others)
    assert choose_positions(0, "a.png", "late", (1, 2), 4).tolist() in ([0, 1], [1, 0])


def test_samples_are_the_activations_behind_the_rectifier(dataset: Dataset) -> None:
    model = tiny_model()
    context = context_of(model, dataset, ["late", "head"], "head", positions=3)
    part = sample(context, range(6))
    with torch.no_grad(), capture(model, context.layers) as run:
        maps = run(images_of(model, dataset, 6))
    late, head = context.layers
    assert late.rectified and not head.rectified
    for i in range(6):
        for k, (y, x) in enumerate(part.places[0][i].tolist()):
            expected = maps["late"][i, :, y, x].clamp(min=0).numpy()
            np.testing.assert_allclose(part.vectors[0][i, k], expected, rtol=1e-4, atol=1e-6)
    assert part.vectors[0].shape == (6, 3, 8) and (part.vectors[0] == 0).any()
    # A layer (B, N) has one position.
    assert part.vectors[1].shape == (6, 1, 5)
    np.testing.assert_allclose(part.vectors[1][:, 0], maps["head"][:, :, 0, 0].numpy(), rtol=1e-4, atol=1e-6)
    assert part.top.tolist() == maps["head"].mean((2, 3)).argmax(1).tolist()


def test_tokens_and_a_network_without_a_classifier(dataset: Dataset) -> None:
    torch.manual_seed(0)
    model = model_of(Tokens())
    context = context_of(model, dataset, ["mix"], None, positions=2)
    assert not context.layers[0].rectified
    part = sample(context, range(5))
    assert part.vectors[0].shape == (5, 2, 6) and (part.vectors[0] < 0).any()
    assert (part.top == -1).all()


def test_any_division_gives_the_same_bytes(dataset: Dataset) -> None:
    context = context_of(tiny_model(), dataset, ["block.0", "late"], "head", positions=2)
    whole = sample(context, range(14)).arrays()
    parts = [sample(context, numbers) for numbers in (range(4), range(4, 12), range(12, 14))]
    joined = SamplesPart.joined([SamplesPart.from_arrays(part.arrays()) for part in parts]).arrays()
    assert whole.keys() == joined.keys()
    for name, array in whole.items():
        assert array.dtype == joined[name].dtype and np.array_equal(array, joined[name]), name


def test_images_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    for i in range(6):
        Image.new("RGB", (40, 40), (40 * i, 90, 20)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    dataset = list_dataset(DataConfig(source="folder", root=str(tmp_path)), 3)
    part = sample(context_of(tiny_model(), dataset, ["late"], "head", 1), range(6))
    assert part.index.tolist() == [0, 1, 2, 4, 5] and [i for i, _ in part.failed] == [3]
    assert SamplesPart.from_arrays(part.arrays()).failed == part.failed


def test_what_is_asked_for_is_checked(dataset: Dataset, tiny: Model, tiny_run: list[str]) -> None:
    preset = compose(tiny_run).config.render
    layers = enumerate_layers(tiny)

    def asked(config: ActivationAtlasConfig, listed: Dataset = dataset):
        return request_activation_atlas(config, listed, layers, preset, [], 4, (32, 32))

    assert asked(ActivationAtlasConfig()) is None
    found = asked(ActivationAtlasConfig(layers=("block.*", "late"), images=5, positions=3))
    assert found is not None and {layer.name for layer in found.layers} >= {"block.0", "late"}
    assert all(layer.name == "late" or layer.name.startswith("block.") for layer in found.layers)
    assert len(found.images) == 5 and found.outputs is None
    assert found.samples(found.layers[-1]) == 15
    with pytest.raises(AtlasError, match=r"no layer of this run .* matches 'lat'\. .*late.*layers\.include"):
        asked(ActivationAtlasConfig(layers=("lat",)))
    with pytest.raises(AtlasError, match="needs dataset images"):
        asked(ActivationAtlasConfig(layers=("late",)), Dataset((), {}))
