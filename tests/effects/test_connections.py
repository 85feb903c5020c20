"""Attributions of connections, against a loop that differentiates one pair at a time."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.data.config import DataConfig
from pipeline.data.datasets import Dataset, list_dataset
from pipeline.effects.connections import measure_connections, merged
from pipeline.effects.measurement import EffectsContext
from pipeline.layers.finding import Layer, enumerate_layers
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, prepare_module


class Branches(nn.Module):
    """Two parallel branches, of which the second does not feed the first, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.left = nn.Conv2d(4, 5, 3, stride=2, padding=1)
            self.right = nn.Conv2d(4, 5, 1, stride=2)
            self.after = nn.Conv2d(5, 5, 3, padding=1)
            self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.left(x)) + torch.relu(self.right(x))
        return self.head(torch.relu(x + self.after(x)).mean((2, 3)))


@pytest.fixture
def photographs(tmp_path) -> Dataset:
    generator = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / f"{i}.png")
    return list_dataset(DataConfig("folder", str(tmp_path)))


@pytest.fixture
def context(photographs: Dataset) -> EffectsContext:
    recipe = Preprocessing((16, 16), 16, (0.5,) * 3, (0.25,) * 3)
    model = Model(prepare_module(Branches()), "made", recipe, "0", ())
    layers = [layer for layer in enumerate_layers(model) if layer.kind in ("conv", "linear")]
    generator = np.random.default_rng(1)
    means = [generator.normal(0, 0.2, layer.channels).astype(np.float32) for layer in layers[:-1]]
    return EffectsContext(model, layers[:-1], layers[-1], means, [()] * 4, photographs, 4)


def by_loop(folder: Path, model: Model, source: tuple[Layer, np.ndarray], target: Layer, channel: int) -> np.ndarray:
    """Return the mean attribution of each source channel to a target channel, by a pass for each image."""
    found, (before, mean) = [], source
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as file:
            image = torch.from_numpy(np.array(file)).permute(2, 0, 1)[None].float() / 255
        kept: dict[str, torch.Tensor] = {}
        handles = [
            model.module.get_submodule(layer.module).register_forward_hook(
                lambda _m, _a, output, name=layer.name, to=kept: to.update({name: output.requires_grad_()})
            )
            for layer in (before, target)
        ]
        top = model.module(model.normalize(image)).max()
        for handle in handles:
            handle.remove()
        (slope,) = torch.autograd.grad(top, kept[target.name], retain_graph=True)
        response = (kept[target.name][:, channel] * slope[:, channel]).sum()
        (gradient,) = torch.autograd.grad(response, kept[before.name])
        change = kept[before.name].detach() - torch.from_numpy(mean)[:, None, None]
        found.append((change * gradient).sum((0, 2, 3)).numpy())
    return np.mean(found, 0)


def test_attributions_are_those_of_a_loop(context: EffectsContext, tmp_path: Path) -> None:
    channels = [list(range(layer.channels)) for layer in context.layers]
    parts = [measure_connections(context, channels, range(len(context.dataset.images)))]
    found = merged(parts, [layer.name for layer in context.layers])
    # `right` comes after `left`, but is not fed by it.
    assert {name: one.source for name, one in found.items()} == {"left": "stem", "right": "stem", "after": "right"}
    layers = {layer.name: (layer, mean) for layer, mean in zip(context.layers, context.means, strict=True)}
    for name, one in found.items():
        assert one.images == 7 and np.abs(one.value).max() > 1e-4
        for channel in (0, 3):
            expected = by_loop(tmp_path, context.model, layers[one.source], layers[name][0], channel)
            np.testing.assert_allclose(one.value[channel], expected, rtol=1e-4, atol=1e-5)


def test_no_division_of_the_images_changes_a_byte(context: EffectsContext) -> None:
    channels = [[0, 2]] * len(context.layers)
    names = [layer.name for layer in context.layers]
    whole = merged([measure_connections(context, channels, range(7))], names)
    parts = merged([measure_connections(context, channels, part) for part in (range(4), range(4, 7))], names)
    assert set(whole) == set(parts) and whole["left"].value.shape == (2, 4)
    for name, one in whole.items():
        assert one.value.tobytes() == parts[name].value.tobytes() and parts[name].images == 7


def test_a_single_layer_has_no_connections(context: EffectsContext) -> None:
    alone = dataclasses.replace(context, layers=context.layers[:1], means=context.means[:1])
    parts = [measure_connections(alone, [[0, 2]], range(7))]
    assert parts[0]["count"].tolist() == [7] and merged(parts, ["stem"]) == {}
