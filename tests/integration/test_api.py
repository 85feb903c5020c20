"""The functions for notebooks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyNet

import pipeline
from pipeline.core.errors import AtlasError

SETTINGS = ["render.steps=24", "render.size=32", "render.margin=4"]


@pytest.fixture(scope="module")
def network() -> "pipeline.Network":
    torch.manual_seed(1)
    return pipeline.Network.of(TinyNet().eval(), input_size=32)


def test_one_call_makes_an_image_with_numbers(network: "pipeline.Network", capsys: pytest.CaptureFixture[str]) -> None:
    image = pipeline.visualize(network, "late:3", settings=SETTINGS)
    assert image.image.shape == (32, 32, 3) and image.image.dtype == np.uint8
    assert image.activation > image.details.start and image._repr_png_()[1:4] == b"PNG"
    assert "late" in capsys.readouterr().err
    several = pipeline.visualize(network, ["late:3", "late:5"], settings=SETTINGS, progress=False)
    assert [one.unit for one in several] == ["late:3", "late:5"]
    assert np.abs(several[0].image.astype(int) - image.image).max() <= 1


def test_a_preset_with_a_file_of_the_package(network: "pipeline.Network") -> None:
    """The spectrum of `maco` is read here as a plan reads it."""
    image = pipeline.visualize(network, "late:1", "maco", SETTINGS, progress=False)
    assert image.image.std() > 10


def test_the_module_itself_is_not_changed() -> None:
    module = TinyNet().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    pipeline.visualize(pipeline.Network.of(module, input_size=32), "late:0", "naive", SETTINGS, progress=False)
    assert module.training and module.relu.inplace
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("unit", "message"),
    [("lat:3", "Nearest: late"), ("late:99", "channels 0 to 7"), ("late", "write layer:channel")],
)
def test_units_that_do_not_exist(network: "pipeline.Network", unit: str, message: str) -> None:
    with pytest.raises(AtlasError, match=message):
        pipeline.visualize(network, unit)


def test_dataset_examples_are_the_largest_activations(network: "pipeline.Network", photo_folder: Path) -> None:
    examples = pipeline.dataset_examples(network, "late", photo_folder, k=3, progress=False)
    assert examples.index.shape == (8, 3) and (np.diff(examples.activation, axis=1) <= 0).all()
    image = torch.from_numpy(examples.image(2).astype(np.float32) / 255).permute(2, 0, 1)[None]
    module = network.model.module
    maps: list[torch.Tensor] = []
    handle = module.get_submodule("late").register_forward_hook(lambda _, __, output: maps.append(output))
    module(network.model.normalize(image))
    handle.remove()
    assert float(maps[0][0, 2].amax()) == pytest.approx(float(examples.activation[2, 0]), rel=1e-3)


def test_importing_the_package_finds_public_names_late() -> None:
    assert {"visualize", "dataset_examples", "open_atlas", "Atlas"} <= set(dir(pipeline))
    with pytest.raises(AttributeError, match="has no attribute 'visualise'"):
        _ = pipeline.visualise  # type: ignore[attr-defined]
