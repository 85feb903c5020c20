"""The objective of depthwise convolutions, whose mean rises when the one channel that they read is silent."""

from pathlib import Path

import numpy as np
import pytest
from conftest import compose

from pipeline.cli.main import main
from pipeline.layers.selection import list_layers
from pipeline.models.loading import load_model
from pipeline.store.reader import open_atlas
from pipeline.visualization.objectives import compared_examples

NETWORK = '''
import torch
from torch import nn


def build(norm=False):
    """Edges of four orientations, and where each is thin: the kernels of the second convolution sum to −4."""
    stem, thin = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
    edge = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]) / 8
    surround = torch.full((3, 3), -1.0)
    surround[1, 1] = 4
    with torch.no_grad():
        stem.weight.copy_(torch.stack([edge.rot90(k).expand(3, 3, 3) for k in range(4)]))
        thin.weight.copy_(surround.expand(4, 1, 3, 3))
    after = nn.GroupNorm(1, 4) if norm else nn.ReLU6()
    return nn.Sequential(stem, nn.ReLU6(), thin, after, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
'''


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> list[str]:
    """A network with a depthwise convolution in a file of the user's, and a short run of its layers."""
    folder = tmp_path_factory.mktemp("depthwise")
    (folder / "thin.py").write_text(NETWORK)
    own = ["model=custom", f"model.target={folder / 'thin.py'}:build", "model.input_size=32", "layers=convs"]
    short = ["engine=inline", "render.steps=48", "render.variants=1", "data=folder", f"data.root={photo_folder}"]
    return [*own, *short, f"run.root={folder}", "site.own_image=false"]


def objectives(*overrides: str) -> dict[str, str]:
    """Return the objective of each layer."""
    config = compose(list(overrides)).config
    layers = list_layers(load_model(config.model).to("cpu"), config.layers)
    return {layer.name: type(config.render.for_layer(layer).objective).__name__ for layer in layers}


def test_depthwise_convolutions_before_a_rectifier_have_an_objective_of_their_own(settings: list[str]) -> None:
    own = objectives(*settings)
    assert own["0"] == "Energy" and own["2"] == "Rectified" and own["6"] == "Channel"
    # Without a rectifier behind it, zero says nothing; and minimized, the mean is what says most.
    assert objectives(*settings, "model.arguments={norm: true}")["2"] == "Channel"
    assert objectives(*settings, "render=negative")["2"] == "Channel"
    assert objectives(*settings, "render/objective=channel")["2"] == "Channel"
    named = objectives("model=efficientnet_lite0", "model.weights=null", "model.input_size=64")
    kinds = {name.rpartition(".")[2]: objective for name, objective in named.items() if name.startswith("blocks.3.1.")}
    assert kinds["conv_dw"] == "Rectified" and {kinds[name] for name in ("conv_pw", "conv_pwl")} == {"Channel"}


def test_the_image_shows_what_activates_the_unit_and_not_what_silences_its_input(
    settings: list[str], tmp_path: Path
) -> None:
    peaks, natural = {}, {}
    for name, own in {"auto": [], "channel": ["render/objective=channel"]}.items():
        assert main(["run", *settings, f"run.name={name}", f"run.root={tmp_path}", *own]) in (0, 1)
        with open_atlas(tmp_path / name) as atlas:
            layer = atlas["2"]
            rendering = layer.render_attributes("distill")
            assert (rendering["objective"], rendering["natural"]) == (
                ("rectified", "") if name == "auto" else ("channel", "mean")
            )
            measured = layer.measurements("distill")
            peaks[name] = measured["peak"][:, 0]
            assert np.isfinite(measured["peak_ratio"]).all()
            # In the images of the largest means, such a unit is silent.
            natural[name] = layer.path_curves("distill").natural
            assert compared_examples(rendering["objective"], False) == ("max" if name == "auto" else "mean")
    assert not np.array_equal(natural["auto"], natural["channel"], equal_nan=True)
    page = (tmp_path / "auto" / "site" / "layers" / "2.html").read_text(encoding="utf-8")
    assert "objective rectified" in page
    assert (peaks["auto"] > 1.5 * peaks["channel"]).all(), peaks
