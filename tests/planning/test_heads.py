"""Heads fitted to the logits of a network: the fit where the answer is known, the schedule, and the files of a run."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose
from safetensors import safe_open

from pipeline.core.errors import AtlasError
from pipeline.core.registry import canonical
from pipeline.data import datasets
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Dataset
from pipeline.layers.finding import Layer, capture
from pipeline.layers.heads import HeadLayer, fit_head
from pipeline.models.loading import Model
from pipeline.planning import heads
from pipeline.planning.planner import make_plan
from pipeline.runs.runner import plan_run
from pipeline.visualization.schedules import Stage

FOLDS = np.arange(200) % 5


def linear_case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, their weights, and logits: a linear function, an offset of each image that says nothing, and noise."""
    rng = np.random.default_rng(0)
    features = rng.normal(3.0, [1.0, 10.0, 0.1, 1.0, 1.0, 1.0], (200, 6))
    weight = rng.normal(0, 1, (6, 4)) / np.array([1.0, 10.0, 0.1, 1.0, 1.0, 1.0])[:, None]
    logits = features @ weight + np.array([0.0, 1.0, 2.0, 3.0])
    return features, weight, logits + rng.normal(0, 20, (200, 1)) + rng.normal(0, 0.05, logits.shape)


def test_a_linear_function_is_recovered() -> None:
    """Features of other scales count alike, and an offset of all logits of an image does not count."""
    features, weight, logits = linear_case()
    found, bias, scores = fit_head(features, logits, FOLDS)
    assert np.allclose(found, weight - weight.mean(1, keepdims=True), atol=0.02 * np.abs(weight).max())
    centered = logits - logits.mean(1, keepdims=True)
    assert np.abs(features @ found + bias - centered).mean() < 0.1
    assert scores.r2 > 0.99 and scores.top1 > 0.95 and scores.images == 200 and scores.ridge <= 0.01


def test_features_without_relation_predict_nothing() -> None:
    """The fit to all images would look excellent: there are as many features as images."""
    rng = np.random.default_rng(1)
    _, _, scores = fit_head(rng.normal(size=(200, 180)), rng.normal(size=(200, 4)), FOLDS)
    assert scores.r2 < heads.MIN_R2 and scores.ridge >= 10 and scores.top1 < 0.4


def fitted_head(layer: Layer, classes: int = 5) -> HeadLayer:
    rng = np.random.default_rng(2)
    weight = rng.normal(size=(layer.channels, classes)).astype(np.float32)
    bias = rng.normal(size=classes).astype(np.float32)
    scores = fit_head(rng.normal(size=(40, 3)), rng.normal(size=(40, classes)), np.arange(40) % 2)[2]
    return dataclasses.replace(HeadLayer.on(layer, classes), identity="1", weight=weight, bias=bias, scores=scores)


def test_a_head_is_read_like_any_layer(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    head = fitted_head(tiny_layers["late"])
    images = torch.rand(2, 3, 40, 24, requires_grad=True)
    with capture(tiny, [tiny_layers["late"], head]) as forward:
        found = forward(images)
    expected = found["late"].mean((2, 3)).detach().numpy() @ head.weight + head.bias
    assert found["head@late"].shape == (2, 5, 1, 1)
    assert np.allclose(found["head@late"].detach().numpy()[:, :, 0, 0], expected, atol=1e-5)
    assert torch.autograd.grad(found["head@late"].sum(), images)[0].abs().sum() > 0
    assert head.tap != dataclasses.replace(head, identity="2").tap


def test_stages_get_heads_only_where_the_network_has_none(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    config, candidates = compose(["render=oygard"]).config, list(tiny_layers.values())
    logits = [tiny_layers["head"]]

    def resolved(*stages: Stage) -> tuple[list[str | None], list[str]]:
        asked = dataclasses.replace(config, render=dataclasses.replace(config.render, schedule=stages))
        found, needed = heads.with_heads(asked, tiny, candidates, logits)
        assert all(stage.head is None for stage in found.render.schedule)
        return [stage.layer for stage in found.render.schedule], [head.name for head in needed]

    named = [layer.name for layer in heads.selection.blocks_before(tiny, candidates, logits[0])]
    assert resolved(Stage(), Stage(layer="late", head=0.5)) == ([None, "late"], [])
    assert resolved(Stage(layer="aux", head=1.0)) == ([f"head@{named[-1]}"], [f"head@{named[-1]}"])
    assert resolved(Stage(head=0.01)) == ([f"head@{named[0]}"], [f"head@{named[0]}"])
    assert resolved(Stage(layer="head@block.0"))[1] == ["head@block.0"]
    with pytest.raises(AtlasError, match="no layer 'nose'"):
        resolved(Stage(layer="head@nose"))
    logits.clear()
    with pytest.raises(AtlasError, match=r"tiny has no classifier\. Use render/schedule=blur"):
        resolved(Stage(layer="aux", head=1.0))
    assert resolved(Stage(), Stage(layer="late")) == ([None, "late"], [])


def source_of(model: Model, dataset: Dataset, logits: Layer, fingerprint: str = "1") -> heads.HeadSource:
    return heads.HeadSource(model, model, dataset, fingerprint, logits)


def test_heads_are_fitted_once_and_kept(
    tiny: Model, tiny_layers: dict[str, Layer], photo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The pooled output of the last layer determines the logits of this network: the head must find the classifier."""
    dataset = datasets.list_dataset(DataConfig(source="folder", root=str(photo_folder)), 3)
    source = source_of(tiny, dataset, tiny_layers["head"])
    wanted = [HeadLayer.on(tiny_layers["late"], 5)]
    with caplog.at_level(logging.INFO):
        (head,) = heads.fitted(wanted, source, [tmp_path]).values()
    assert head.scores is not None and head.scores.r2 > 0.3 and head.scores.images == 20
    assert "fitted to 20 images only" in caplog.text and "agreement with the network's own class" in caplog.text
    heads.write(tmp_path, [head])
    with safe_open(tmp_path / heads.FILE, framework="numpy") as archive:
        assert set(archive.keys()) == {"head@late.weight", "head@late.bias"}
    assert (tmp_path / heads.TABLE).read_text().startswith("head,images,ridge,r2,top1,top5\nhead@late,20,")
    nowhere = dataclasses.replace(source, dataset=Dataset((), {}))
    (again,) = heads.fitted(wanted, nowhere, [tmp_path]).values()
    assert again == head and np.array_equal(again.weight, head.weight) and again.scores == head.scores
    with pytest.raises(AtlasError, match=r"at least 20 dataset images .* and 0 can be read"):
        heads.fitted(wanted, source_of(tiny, Dataset((), {}), tiny_layers["head"], "2"), [tmp_path])
    (tmp_path / heads.FILE).write_bytes(b"damaged")
    with pytest.raises(AtlasError, match="at least 20 dataset images"):
        heads.fitted(wanted, nowhere, [tmp_path])
    assert "cannot be read" in caplog.text


def test_a_head_at_chance_is_refused(tiny: Model, tiny_layers: dict[str, Layer], tmp_path: Path) -> None:
    head = fitted_head(tiny_layers["late"])
    assert head.scores is not None
    source = source_of(tiny, Dataset((), {}), tiny_layers["head"])
    chance = dataclasses.replace(head, identity=source.identity(head), scores=dataclasses.replace(head.scores, r2=0.0))
    heads.write(tmp_path, [chance])
    with pytest.raises(AtlasError, match="no better than their mean does"):
        heads.fitted([HeadLayer.on(tiny_layers["late"], 5)], source, [tmp_path])


OYGARD = ["render=oygard", "render.size=92", "render.steps=8", "layers=logits", "layers.include=[]"]


def test_a_plan_has_the_heads_and_its_folder_keeps_them(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line to what workers receive; a second plan reads the file."""
    monkeypatch.setattr(heads, "MIN_R2", -1.0)  # random weights and 20 images: the heads are at chance
    request = compose([*tiny_run, *OYGARD])
    plan = plan_run(request)
    found = [layer for layer in plan.setup.others if isinstance(layer, HeadLayer)]
    assert len(found) == 2 and all(head.weight.any() and head.identity for head in found)
    assert [stage.layer for stage in plan.setup.config.render.schedule][2:] == [head.name for head in found]
    assert "head" not in canonical(plan.setup.config.render)["schedule"][2]
    assert (tmp_path / "tiny" / heads.FILE).is_file() and (tmp_path / "tiny" / heads.TABLE).is_file()
    again = make_plan(request.config, timed=False).setup.others
    assert again == plan.setup.others


def test_hidden_layers_are_refused(tiny_run: list[str]) -> None:
    with pytest.raises(AtlasError, match=r"conv_stem does not hold their logits\. Set layers=logits"):
        make_plan(compose([*tiny_run, "render=oygard"]).config, timed=False)
