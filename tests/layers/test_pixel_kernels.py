"""Layers that are linear in the pixels: which they are, and that their kernels are what a pixel changes."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import compose
from torch import Tensor, nn

from pipeline.layers.finding import Layer, capture
from pipeline.layers.pixel_kernels import pixel_kernels
from pipeline.layers.receptive_fields import receptive_fields
from pipeline.layers.selection import LayersConfig, list_layers
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, load_model, prepare_module, weights_digest


def model_of(module: nn.Module) -> Model:
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    recipe = Preprocessing((16, 20), 16, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    return Model(prepare_module(module), "made", recipe, weights_digest(module), ())


def layers_of(model: Model) -> dict[str, Layer]:
    layers = list_layers(model, LayersConfig())
    fields = receptive_fields(model, layers)
    return {layer.name: dataclasses.replace(layer, field=fields[layer.name]) for layer in layers}


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position, as in ConvNeXt."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_a_kernel_is_the_folded_one_divided_by_the_deviations_of_the_preprocessing() -> None:
    torch.manual_seed(0)
    stem, norm = nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5)
    model = model_of(nn.Sequential(stem, norm, nn.ReLU(), nn.Conv2d(5, 4, 3)))
    layers = layers_of(model)
    assert [name for name, layer in layers.items() if layer.linear_in_pixels] == ["0"]
    found = pixel_kernels(model, layers["0"], (0, 3, 4))
    assert found is not None and found.exact
    assert isinstance(norm.running_var, Tensor)
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    expected = stem.weight * gain[:, None, None, None] / torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    assert np.allclose(found.kernel, expected[[0, 3, 4]].detach().numpy(), rtol=1e-4, atol=1e-5)


def test_two_convolutions_without_a_rectifier_are_one_kernel() -> None:
    """The composed kernel times a change of the image is the change of the activation; a rectifier ends it."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 6, 2, stride=2)
    model = model_of(nn.Sequential(first, second, nn.ReLU(), nn.Conv2d(6, 2, 1)))
    layers = layers_of(model)
    assert [name for name, layer in layers.items() if layer.linear_in_pixels] == ["0", "1"]
    layer = layers["1"]
    found = pixel_kernels(model, layer, range(6))
    assert found is not None and found.kernel.shape == (6, 3, 4, 4)
    images = torch.rand(2, 3, 16, 20)
    with capture(model, [layer]) as forward, torch.no_grad():
        maps = forward(images)["1"]
    y, x = 2, 5
    patch = (images[1] - images[0])[:, 2 * y : 2 * y + 4, 2 * x : 2 * x + 4].numpy()
    change = np.einsum("cihw,ihw->c", found.kernel, patch)
    assert np.allclose(change, (maps[1] - maps[0])[:, y, x].numpy(), atol=1e-4)


def test_a_normalization_by_statistics_of_the_image_is_left_out_and_said() -> None:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 6, 4, stride=4)
    model = model_of(nn.Sequential(stem, ChannelNorm(6), nn.Conv2d(6, 4, 3), nn.GELU()))
    layers = layers_of(model)
    assert [name for name, layer in layers.items() if layer.linear_in_pixels] == ["0"]
    found = pixel_kernels(model, layers["0"], range(6))
    assert found is not None and not found.exact
    expected = stem.weight / torch.tensor([0.2, 0.25, 0.3])[:, None, None]
    assert np.allclose(found.kernel, expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    assert pixel_kernels(model, layers["2"], range(4)) is None


@pytest.mark.parametrize(("name", "stem"), [("efficientnet_lite0", "conv_stem"), ("resnet18", "conv1")])
def test_the_first_convolution_of_a_network_is_its_only_linear_layer(name: str, stem: str) -> None:
    config = compose([f"model={name}", "model.weights=null"]).config
    layers = list_layers(load_model(config.model).to("cpu"), config.layers)
    assert [layer.name for layer in layers if layer.linear_in_pixels] == [stem]
