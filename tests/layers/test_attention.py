"""Attention heads as units: what they write and attend to, class and register tokens, and a whole run."""

import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from conftest import main
from torch import Tensor, nn

import pipeline
from pipeline.core.errors import AtlasError
from pipeline.effects.config import EffectsConfig
from pipeline.effects.request import request_effects
from pipeline.layers.attention import AttentionLayer
from pipeline.layers.finding import Layer, capture
from pipeline.layers.selection import LayersConfig, list_layers, select_layers
from pipeline.models.config import ModelConfig
from pipeline.models.loading import Model, load_model


@pytest.fixture(scope="module")
def vit() -> Model:
    return load_model(ModelConfig("timm", "test_vit", weights=None)).to("cpu")


@pytest.fixture(scope="module")
def torchvision_vit() -> Model:
    return load_model(ModelConfig("torchvision", "vit_b_32", weights=None)).to("cpu")


def listed(model: Model, **settings: object) -> dict[str, Layer]:
    return {layer.name: layer for layer in list_layers(model, LayersConfig(heads=True, **settings))}  # type: ignore[arg-type]


def images_for(model: Model, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, *model.preprocessing.size, generator=generator)


def values(model: Model, layer: Layer, images: Tensor) -> Tensor:
    with capture(model, [layer]) as forward, torch.no_grad():
        return forward(images)[layer.name]


def timm_weights(model: Model, path: str, images: Tensor) -> tuple[Tensor, Tensor]:
    """The attention (B, H, N, N) and the outputs of the heads (B, N, H, d) by timm's own code without fusion."""
    module, seen = model.module.get_submodule(path), {}
    handles = [
        module.attn_drop.register_forward_pre_hook(lambda _, args: seen.update(attention=args[0])),
        module.proj.register_forward_pre_hook(lambda _, args: seen.update(mixed=args[0])),
    ]
    fused, module.fused_attn = module.fused_attn, False
    try:
        with torch.no_grad():
            model.module(model.normalize(images))
    finally:
        module.fused_attn = fused
        for handle in handles:
            handle.remove()
    return seen["attention"], seen["mixed"].unflatten(-1, (module.num_heads, -1))


def test_heads_and_attention_are_those_of_timm(vit: Model) -> None:
    images = images_for(vit)
    attention, mixed = timm_weights(vit, "blocks.2.attn", images)
    weight = vit.module.blocks[2].attn.proj.weight.detach()
    size = mixed.shape[-1]
    written = [mixed[:, :, head] @ weight[:, head * size : (head + 1) * size].T for head in range(mixed.shape[2])]
    # The heads add up to what the module returns.
    whole = sum(written) + vit.module.blocks[2].attn.proj.bias
    with torch.no_grad():
        torch.testing.assert_close(whole, vit.module.blocks[2].attn.proj(mixed.flatten(2)))
    for part, tokens in (("patches", slice(1, None)), ("class", slice(0, 1)), ("all", slice(None))):
        layers = listed(vit, tokens=part)
        norms = values(vit, layers["blocks.2.attn@heads"], images)
        expected = torch.stack(written, 1).norm(dim=-1)[:, :, tokens]
        torch.testing.assert_close(norms.flatten(2), expected, rtol=1e-4, atol=1e-5)
        paid = values(vit, layers["blocks.2.attn@attention"], images)
        torch.testing.assert_close(paid.flatten(2), attention[:, :, 0, tokens], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(paid.sum((2, 3)), torch.ones(2, paid.shape[1]))


def test_attention_is_that_of_pytorch(torchvision_vit: Model) -> None:
    model, images, path = (
        torchvision_vit,
        images_for(torchvision_vit, 1),
        "encoder.layers.encoder_layer_3.self_attention",
    )
    module, seen = model.module.get_submodule(path), {}
    handle = module.register_forward_pre_hook(lambda _, args: seen.update(input=args[0]))
    with torch.no_grad():
        model.module(model.normalize(images))
        handle.remove()
        query = seen["input"]
        _, attention = module(query, query, query, need_weights=True, average_attn_weights=False)
    layers = listed(model)
    paid = values(model, layers[f"{path}@attention"], images)
    assert paid.shape == (1, 12, 7, 7)
    torch.testing.assert_close(paid.flatten(2), attention[:, :, 0, 1:], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        # With all other heads' columns at 0, the module returns what one head writes.
        bias, weight = module.out_proj.bias, module.out_proj.weight
        kept = torch.zeros_like(weight)
        kept[:, 64:128] = weight[:, 64:128]
        before = weight.clone()
        weight.copy_(kept)
        alone = module(query, query, query, need_weights=False)[0] - bias
        weight.copy_(before)
    norms = values(model, layers[f"{path}@heads"], images)
    torch.testing.assert_close(norms[:, 1].flatten(1), alone.norm(dim=-1)[:, 1:], rtol=1e-4, atol=1e-5)


def test_without_a_class_token_attention_is_the_mean_over_all_tokens() -> None:
    model = load_model(ModelConfig("timm", "test_vit2", weights=None)).to("cpu")
    layer = listed(model)["blocks.0.attn@attention"]
    assert isinstance(layer, AttentionLayer)
    assert layer.prefix == 1 and not layer.by_class  # a register, and no class token
    images = images_for(model)
    attention, _ = timm_weights(model, "blocks.0.attn", images)
    paid = values(model, layer, images)
    torch.testing.assert_close(paid.flatten(2), attention.mean(2)[..., 1:], rtol=1e-4, atol=1e-6)


def test_registers_are_apart_from_the_class_token(vit: Model) -> None:
    module = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, depth=2).eval()
    preprocessing = dataclasses.replace(vit.preprocessing, size=(56, 56))
    model = Model(module, "registers", preprocessing, "0" * 64, ())
    shapes = {}
    for part in ("class", "registers", "prefix"):
        layer = listed(model, tokens=part)["blocks.0"]
        shapes[part] = values(model, layer, images_for(model))
    assert [shapes[part].shape[3] for part in shapes] == [1, 4, 5]
    torch.testing.assert_close(torch.cat([shapes["class"], shapes["registers"]], 3), shapes["prefix"])


class Rotary(nn.Module):
    """Attention whose queries are changed between the projection and the product."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, -1))
        q = q * torch.linspace(0, 3, q.shape[2])[:, None]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class RotaryNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.classifier = nn.Conv2d(3, 16, 8, 8), Rotary(), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.attention(self.stem(images).flatten(2).transpose(1, 2)).mean(1))


def test_attention_that_is_computed_otherwise_is_left_out(vit: Model) -> None:
    torch.manual_seed(0)
    model = Model(RotaryNet().eval(), "rotary", vit.preprocessing, "0" * 64, ())
    names = [name for name, layer in listed(model).items() if not layer.of_channels]
    assert names == ["attention@heads"]


def test_what_is_refused() -> None:
    model = load_model(ModelConfig("timm", "test_efficientnet", weights=None, input_size=64)).to("cpu")
    with pytest.raises(AtlasError, match=r"layers\.heads=true.*no attention module.*Leave layers\.heads out"):
        list_layers(model, LayersConfig(heads=True))
    with pytest.raises(AtlasError, match=r"layers\.tokens=class.*no layer.*layers\.tokens=patches"):
        list_layers(model, LayersConfig(tokens="class"))


def test_heads_are_part_of_every_policy_and_have_no_effects(vit: Model) -> None:
    config = LayersConfig(policy="blocks", heads=True)
    layers = list_layers(vit, config)
    chosen = select_layers(vit, layers, config)
    assert {layer.kind for layer in chosen} == {"block", "heads", "attention pattern"}
    only = [layer for layer in chosen if not layer.of_channels]
    assert request_effects(EffectsConfig(images=4), None, [(layer, (0,)) for layer in only], layers, ()) is None  # type: ignore[arg-type]


@pytest.mark.long
@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_a_whole_run(engine: str, tmp_path: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    settings = [
        "model=timm", "model.name=test_vit", "model.weights=null", "layers=logits", "layers.heads=true",
        "layers.include=[blocks.4.attn@*,head]", "layers.channels='0:3'", "render.steps=12", f"engine={engine}",
        "data=folder", f"data.root={photo_folder}", "effects.images=4", "effects.ablated=2", f"run.root={tmp_path}",
        "run.name=heads",
    ]  # fmt: skip
    assert main(["run", *settings]) == 0
    assert main(["verify", *settings]) == 0
    with pipeline.open_atlas(tmp_path / "heads") as atlas:
        assert list(atlas.layers) == ["blocks.4.attn@heads", "blocks.4.attn@attention", "head"]
        for name in atlas.layers[:2]:
            layer = atlas[name]
            numbers = layer.measurements(layer.presets[0])
            assert layer.effects() is None and (numbers["activation"] > numbers["start"]).all()
        attention = atlas["blocks.4.attn@attention"]
        stats = attention.stats()
        assert (stats["max"] < 1).all() and (stats["min"] > 0).all()
    assert (tmp_path / "heads" / "site" / "layers").is_dir()
