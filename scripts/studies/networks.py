"""EfficientNet-Lite or its first stages, without strides or with random weights, as targets of `model=custom`."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_model

SEED = 0


class FirstStages(nn.Module):
    """The stem and the first stages of an EfficientNet and one more convolution, with the names of the whole network.

    What comes after has no influence on the activations of these layers, and without strides it would cost a hundred
    times as much as they do.
    """

    def __init__(self, network: nn.Module, whole_stages: int) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = network.conv_stem, network.bn1
        stages: nn.Sequential = network.blocks  # type: ignore[assignment]
        block = stages[whole_stages][0]
        expansion = nn.Sequential(OrderedDict(conv_pw=block.conv_pw, bn1=block.bn1))
        self.blocks = nn.Sequential(*stages[:whole_stages], nn.Sequential(expansion))

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(self.bn1(self.conv_stem(images)))  # type: ignore[operator]


def efficientnet_lite(
    number: int, trained: bool = True, strided: bool = True, whole_stages: int | None = None
) -> nn.Module:
    """Return EfficientNet-Lite `number` or its first stages, optionally with random weights or without strides.

    Random weights are those of PyTorch's initialization, with the statistics of batch normalization measured on noise,
    so that activations neither die nor grow with depth.
    """
    name = f"efficientnet_lite{number}"
    torch.manual_seed(SEED)
    module = load_model(ModelConfig("package", name, weights="default" if trained else None)).module
    if whole_stages is not None:
        module = FirstStages(module, whole_stages)
    if not trained:
        calibrate(module)
    return module if strided else without_strides(module)


def without_strides(module: nn.Module) -> nn.Module:
    """Set every stride to 1 and dilate all later convolutions instead.

    A convolution after strides of s in all computes, at every s-th position, what it computed before: only the
    positions between are new (à-trous computation; Holschneider et al. 1989). Requires that modules are registered in
    the order of computation and that branches have equal strides, as in this family.
    """
    dilation = 1
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            stride = layer.stride[0]
            layer.stride, layer.dilation = (1, 1), (dilation, dilation)
            if not hasattr(layer, "same_padding") and layer.padding != (0, 0) and layer.padding != "same":
                layer.padding = tuple(dilation * (side - 1) // 2 for side in layer.kernel_size)  # type: ignore[assignment]
            dilation *= stride
    return module


@torch.no_grad()
def calibrate(module: nn.Module) -> None:
    """Set the statistics of every batch normalization to those of its input for smooth noise."""
    generator = torch.Generator().manual_seed(SEED)
    coarse = torch.randn(16, 3, 28, 28, generator=generator)
    images = nn.functional.interpolate(coarse, 112, mode="bicubic")
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    module.train()
    module(images)
    module.eval()
    for norm, before in zip(norms, momentum, strict=True):
        norm.momentum = before
