"""Fifteen architectures with random weights: layers, channels and fields against numbers computed another way."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose
from torch import Tensor, nn

from pipeline.layers.finding import Layer, capture, enumerate_layers
from pipeline.layers.receptive_fields import receptive_fields
from pipeline.layers.selection import LayersConfig, select_layers
from pipeline.models.loading import Model, ModelConfig, load_model, weights_digest
from pipeline.visualization.loop import render
from pipeline.visualization.render_job import RenderJob

CIFAR_NET = """
from torch import nn

class Block(nn.Module):
    def __init__(self, i, o, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        widen = lambda: nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
        self.skip = nn.Identity() if i == o else widen()

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.skip(x)
        return self.relu(y)

def build(channels=3, classes=10):
    blocks = [Block(i, o, s) for i, o, s in [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2
              + [(32, 64, 2)] + [(64, 64, 1)] * 2]
    stem = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))
"""


@dataclasses.dataclass(frozen=True)
class Expected:
    """`blocks` is the number of stages and blocks, and their channels by the tables of the papers.

    `hidden` ends the names of convolutions and linear layers that never run as modules. `side` is a small
    picture that the network takes. `fields` are the sizes that the literature or the paper's table gives.
    """

    name: str
    blocks: tuple[int, int]
    side: int = 64
    source: str = "torchvision"
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    prefix: int = 0
    logits: int = 1
    fields: Mapping[str, int | None] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.name}{'-without-aux' if self.arguments else ''}"


TABLE = (
    # Araujo et al. 2019 ("Computing receptive fields"): AlexNet 195, VGG-16 212, Inception v3 1311.
    Expected("alexnet", (2, 256 + 1000), fields={"features.0": 11, "features.10": 163, "features.12": 195}),
    Expected("vgg16", (2, 512 + 1000), fields={"features.28": 196, "features.30": 212}),
    Expected("googlenet", (9, 256 + 480 + 3 * 512 + 528 + 832 + 832 + 1024), hidden=("aux1", "aux2")),
    Expected("googlenet", (9, 256 + 480 + 3 * 512 + 528 + 832 + 832 + 1024), arguments={"aux_logits": False}),
    Expected(
        "inception_v3", (11, 256 + 288 * 2 + 768 * 5 + 1280 + 2048 * 2), 96, hidden=("AuxLogits",),
        fields={"Mixed_7c": 1311},
    ),
    Expected("resnet18", (8, 2 * (64 + 128 + 256 + 512)), fields={"layer1": 43, "layer2": 99, "layer3": 211}),
    # 427 with the stride in the 3 × 3 convolution, as torchvision has it (483 with it in the first 1 × 1).
    Expected("resnet50", (16, 3 * 256 + 4 * 512 + 6 * 1024 + 3 * 2048), fields={"layer4": 427, "fc": None}),
    Expected("densenet121", (63, 58 * 32 + 256 + 512 + 1024 + 1024 + 1024), fields={"features.denseblock1": 59}),
    Expected("mobilenet_v2", (18, 16 + 2 * 24 + 3 * 32 + 4 * 64 + 3 * 96 + 3 * 160 + 320 + 1280),
             fields={"features.18": 491}),
    Expected("mobilenet_v3_large", (17, 16 + 2 * 24 + 3 * 40 + 4 * 80 + 2 * 112 + 3 * 160 + 960 + 1000),
             fields={"features.3": 19, "features.4.block.2": None}),
    Expected("efficientnet_b0", (17, 16 + 2 * 24 + 2 * 40 + 3 * 80 + 3 * 112 + 4 * 192 + 320 + 1280),
             fields={"features.0": 3, "features.1": None}),
    Expected("convnext_tiny", (18, 3 * 96 + 3 * 192 + 9 * 384 + 3 * 768), fields={"features.1.0": 28}),
    Expected("regnet_y_400mf", (16, 48 + 3 * 104 + 6 * 208 + 6 * 440), fields={"stem": 3}),
    Expected("vit_b_16", (13, 13 * 768), 224, prefix=1,
             fields={"conv_proj": 16, "encoder.layers.encoder_layer_0": None}),
    Expected("swin_t", (12, 2 * 96 + 2 * 192 + 6 * 384 + 2 * 768), hidden=("attn.qkv",), fields={"features.0": 4}),
    Expected("deit_tiny_distilled_patch16_224", (12, 12 * 192), 224, "timm", prefix=2, logits=2,
             fields={"patch_embed.proj": 16, "blocks.0": None}),
    Expected("cifar", (9, 3 * (16 + 32 + 64)), 32, "custom", fields={"0": 3, "5": 15, "8": 37, "11": 81}),
)  # fmt: skip


def network(expected: Expected, folder: Path) -> Model:
    settings: dict[str, Any] = {"weights": None, "arguments": expected.arguments}
    if expected.source == "custom":
        (folder / "cifar.py").write_text(CIFAR_NET)
        settings |= {"target": f"{folder}/cifar.py:build", "input_size": 32}
    model = load_model(ModelConfig(expected.source, expected.name, **settings))
    torch.manual_seed(0)
    for module in weighted(model).values():
        # Some begin with weights so small that nothing of the picture reaches the classifier.
        nn.init.kaiming_normal_(module.weight)
    return model


def weighted(model: Model) -> dict[str, nn.Module]:
    """Counted another way: every module of the type, whatever any trace saw."""
    return {n: m for n, m in model.module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def calls(model: Model) -> int:
    """Counted another way: calls of modules inside the network that give one image's tensor."""
    count = 0

    def after(_: nn.Module, __: object, output: Any) -> None:
        nonlocal count
        tensor = output if isinstance(output, Tensor) else output[0]
        count += tensor.dim() >= 2 and tensor.shape[0] == 1

    handles = [m.register_forward_hook(after) for n, m in model.module.named_modules() if n]
    with torch.no_grad():
        model.module(torch.zeros(1, 3, *model.preprocessing.size))
    for handle in handles:
        handle.remove()
    return count


# Up to a minute each.
LONG = (
    "inception_v3", "swin_t", "vgg16", "vit_b_16", "convnext_tiny", "alexnet", "regnet_y_400mf", "densenet121",
    "efficientnet_b0", "mobilenet_v2", "mobilenet_v3_large", "googlenet", "resnet50", "deit_tiny_distilled_patch16_224",
)  # fmt: skip


@pytest.mark.parametrize(
    "expected",
    [pytest.param(e, marks=[pytest.mark.long] if e.name in LONG else []) for e in TABLE],
    ids=lambda e: e.label,
)
def test_layers_channels_fields_and_pictures(expected: Expected, tmp_path: Path) -> None:
    model = network(expected, tmp_path)
    before = state_of(model)
    layers = enumerate_layers(model)

    def by(policy: str) -> list[Layer]:
        return select_layers(model, layers, LayersConfig(policy))

    tree = weighted(model)
    seen = {name: m for name, m in tree.items() if not any(part in name for part in expected.hidden)}
    assert bool(expected.hidden) == (len(seen) < len(tree))
    convs = by("convs")
    assert {la.name: la.channels for la in convs} == {name: m.weight.shape[0] for name, m in seen.items()}
    blocks = by("blocks")
    assert (len(blocks), sum(la.channels for la in blocks)) == expected.blocks
    assert len(by("logits")) == expected.logits and all(la.kind == "linear" for la in by("logits"))
    functional = [la for la in layers if la.module != la.name and la.kind == "linear" and la.name not in ran(model)]
    whole = sum(la.name == "output" for la in layers)
    assert len(by("all")) - len(functional) - whole == calls(model)
    assert {la.prefix for la in blocks if la.layout == "tokens"} <= {expected.prefix}
    assert all(la.height * la.width == 196 for la in blocks if la.layout == "tokens")

    named = [la for la in layers if la.name in expected.fields]
    found = receptive_fields(model.to("cpu"), named)
    assert {name: field and field.size[0] for name, field in found.items()} == dict(expected.fields)
    assert all(field is None or field.size[0] == field.size[1] for field in found.values())

    steps = 6 if expected.side < 200 else 3
    # Random networks are steep: so few steps climb only if they are small, and then on any processor.
    preset = compose(
        [f"render.steps={steps}", "render.margin=4", "render.attempts=1", "render/transforms=none",
         "render.optimizer.lr=0.01"]
    ).config.render  # fmt: skip
    first = {la.kind: la for la in reversed(layers)}
    size = (expected.side, expected.side)
    with capture(model, list(first.values())) as forward, torch.no_grad():
        noise = forward(torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)))
    for kind, layer in first.items():
        # Of random networks some units are dead behind a ReLU, and some saturated behind a ReLU6.
        order = noise[layer.name].mean((0, 2, 3)).argsort().tolist()
        units = sorted({order[-1], order[3 * len(order) // 4], order[len(order) // 2]})
        pictures = render(RenderJob(model, layer, preset, 0, size), [(c, 0) for c in units])
        assert any(p.status != "failed" and p.activation > p.start for p in pictures), (kind, layer.name)
    assert state_of(model) == before


def ran(model: Model) -> set[str]:
    names: set[str] = set()
    handles = [
        m.register_forward_hook(lambda *_, n=n: names.add(n)) for n, m in model.module.named_modules() if n
    ]  # fmt: skip
    with torch.no_grad():
        model.module(torch.zeros(1, 3, *model.preprocessing.size))
    for handle in handles:
        handle.remove()
    return names


def state_of(model: Model) -> list[object]:
    """What looking must leave as it was: modes, hooks, flags, gradients and weights."""
    modules = [
        (n, m.training, getattr(m, "inplace", None), len(m._forward_hooks), len(m._forward_pre_hooks))
        for n, m in model.module.named_modules()
    ]
    weights = [(n, p.requires_grad, p.grad) for n, p in model.module.named_parameters()]
    return [modules, weights, weights_digest(model.module)]
