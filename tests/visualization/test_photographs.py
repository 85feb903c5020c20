"""Pictures that begin with a photograph or are compared with one: accentuations, caricatures, activation grids."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose, tiny_model
from PIL import Image
from test_methods import PRESET, made
from torch import Tensor

import pipeline
from pipeline.cli.main import main
from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError
from pipeline.engine.tasks import Setup, render_digest
from pipeline.images.parameterizations import FromImage, frame
from pipeline.images.transforms import Jitter, Noise, Zoom
from pipeline.layers.finding import Layer, capture, enumerate_layers
from pipeline.models.loading import Model
from pipeline.planning.preset_inputs import default_layer
from pipeline.visualization.initial_images import preprocess_photograph
from pipeline.visualization.layer_regularizers import LAYER_PENALTIES, SeedDistance, balance
from pipeline.visualization.loop import render
from pipeline.visualization.objectives import Activations, Caricature, Directions
from pipeline.visualization.render_job import RenderJob


def photograph(seed: int = 3, side: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 216, (7, 7, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def maps_of(model: Model, layer: Layer, images: Tensor) -> Tensor:
    with capture(model, [layer]) as forward, torch.no_grad():
        return forward(images)[layer.name]


def as_image(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("distance", ["l2", "cosine"])
@pytest.mark.parametrize("name", list(LAYER_PENALTIES))
def test_layer_penalties_against_finite_differences(name: str, distance: str) -> None:
    torch.manual_seed(0)
    maps = torch.randn(3, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(3, 4, 3, 2, dtype=torch.float64)
    term = LAYER_PENALTIES[name](distance=distance)
    assert torch.autograd.gradcheck(lambda x: term.value(x, seed), (maps,), atol=1e-6)
    assert torch.allclose(term.value(seed, seed), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(term.value(maps, seed)[1:2], term.value(maps[1:2], seed[1:2]))


def test_distances_are_relative_to_the_photograph() -> None:
    seed = torch.randn(2, 5, 3, 3) * 7
    assert SeedDistance().value(1.5 * seed, seed).tolist() == pytest.approx([0.5, 0.5], abs=1e-2)
    assert SeedDistance(distance="cosine").value(1.5 * seed, seed).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert SeedDistance(distance="cosine").value(-seed, seed).tolist() == pytest.approx([2, 2], abs=1e-5)


def accentuated(tiny: Model, layers: dict[str, Layer], weight: float) -> tuple[np.ndarray, float, float]:
    """The image, its activation, and its distance from the photograph in the space of `relu`."""
    start = frame(photograph(), (40, 40))
    preset = dataclasses.replace(
        PRESET, canvas=FromImage(), transforms=(Zoom(), Noise(0.02)), steps=24, attempts=1,
        layer_penalties=(SeedDistance(weight, "block.2"),) if weight else (),
    )  # fmt: skip
    (one,) = render(RenderJob(tiny, layers["late"], preset, 0, layers=layers, initial_images={(3, 0): start}), [(3, 0)])
    before, after = (maps_of(tiny, layers["block.2"], as_image(x)) for x in (photograph()[4:36, 4:36], one.image))
    return one.image, one.activation, SeedDistance().value(after, before).item()


def test_an_accentuation_lies_between_the_photograph_and_the_free_image(
    tiny: Model, tiny_layers: dict[str, Layer]
) -> None:
    """With an infinite weight it is the photograph; with a smaller one it activates more and is further away."""
    free, high, far = accentuated(tiny, tiny_layers, 0)
    still, low, near = accentuated(tiny, tiny_layers, 1e6)
    _, middle, between = accentuated(tiny, tiny_layers, 2)
    original = photograph()[4:36, 4:36].astype(int)
    assert np.abs(still - original).mean() < 6 < 20 < np.abs(free - original).mean()
    assert low < middle < high and near < between < far


def test_an_accentuation_is_the_same_in_any_batch(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    starts = {(c, 0): frame(photograph(c), (40, 40)) for c in range(4)}
    preset = dataclasses.replace(
        PRESET, canvas=FromImage(), layer_penalties=(SeedDistance(1.0, "block.2"),), transforms=(Jitter(2), Noise(0.02))
    )
    job = RenderJob(tiny, tiny_layers["late"], preset, 0, layers=tiny_layers, initial_images=starts)
    together, (alone,) = render(job, [(c, 0) for c in range(4)]), render(job, [(2, 0)])
    assert np.abs(together[2].image.astype(int) - alone.image).max() <= 1


def test_an_accentuation_does_not_depend_on_the_value_of_the_objective() -> None:
    """Without a rectifier an offset of the activations has no effect, also if they are zero at the photograph."""
    images = []
    for at_zero in (False, True):
        model = tiny_model()
        layers = {layer.name: layer for layer in enumerate_layers(model)}
        start = maps_of(model, layers["late"], as_image(photograph()[4:36, 4:36]))[0, 3].mean().item()
        if at_zero:
            with torch.no_grad():
                model.module.get_submodule("late").get_parameter("bias")[3] -= start
        image, activation, distance = accentuated(model, layers, 1)
        assert activation > (0 if at_zero else start) + 0.03 and distance > 0.05
        images.append(image.astype(int))
    assert np.abs(images[0] - images[1]).max() <= 1


def test_balance_gives_the_loss_a_gradient_of_the_size_of_the_objective() -> None:
    objective = torch.tensor([[3.0, -1.0], [5.0, 0.0], [0.0, 0.0]])
    loss = torch.tensor([[0.5, 0.5], [0.0, 0.0], [1.0, 1.0]])
    assert balance(objective, loss).tolist() == [4, 0, 0]
    assert balance(7 * objective[:1], loss[:1]).tolist() == [28]


def test_the_default_layer_is_at_a_third_of_the_computation(tiny: Model) -> None:
    layers = enumerate_layers(tiny)
    chosen = default_layer(layers)
    total = max(layer.cost for layer in layers)
    assert chosen.height > 1
    assert abs(chosen.cost / total - 1 / 3) == min(abs(la.cost / total - 1 / 3) for la in layers if la.height > 1)


@pytest.mark.parametrize("power", [0.0, 2.0])
def test_caricatures_against_finite_differences(power: float) -> None:
    torch.manual_seed(1)
    maps = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    for target in (torch.randn(2, 4, 3, 2, dtype=torch.float64), torch.randn(1, 4, 1, 1, dtype=torch.float64)):

        def value(x: Tensor, target: Tensor = target) -> Tensor:
            channels = torch.zeros(2, dtype=torch.long)
            return Caricature(power=power).value(Activations(x, channels, channels, 1, {}, target))

        assert torch.autograd.gradcheck(value, (maps,), atol=1e-6)
        expected = (maps * target).sum(dim=(1, 2, 3)) / 6
        cosine = torch.cosine_similarity(maps.flatten(1), target.expand_as(maps).flatten(1))
        assert torch.allclose(value(maps), expected * cosine.clamp(min=0.1) ** power)


def test_a_caricature_has_more_of_its_own_photograph_than_of_another(
    tiny: Model, tiny_layers: dict[str, Layer]
) -> None:
    layer = tiny_layers["block.2"]
    photos = [photograph(s) for s in (3, 4)]
    targets = [maps_of(tiny, layer, as_image(photo[4:36, 4:36])) for photo in photos]
    for own, other in ((0, 1), (1, 0)):
        preset = dataclasses.replace(PRESET, objective=Caricature(ConfigFile("x", png(photos[own])), 1.0), steps=32)
        (one,) = render(RenderJob(tiny, layer, preset, 0, target_image=frame(photos[own], (40, 40))), [(0, 0)])
        seen = maps_of(tiny, layer, as_image(one.image))
        compared = [targets[own], targets[other]]
        cosines = [torch.cosine_similarity(seen.flatten(1), target.flatten(1)).item() for target in compared]
        assert one.activation > 1.1 * one.start and 1 - cosines[0] < 0.7 * (1 - cosines[1])
        dot = (seen * targets[own]).sum(dim=1).mean().item() * max(0.1, cosines[0])
        assert one.activation == pytest.approx(dot, rel=1e-4)  # of the saved image, with the photograph unmoved


def test_the_caricature_of_a_mean_points_along_it(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    layer = tiny_layers["late"]
    mean = torch.zeros(8)
    mean[5] = 2.0
    preset = dataclasses.replace(PRESET, objective=Caricature())
    (one,) = render(RenderJob(tiny, layer, preset, 0, layer_mean=mean), [(0, 0)])
    (channel,) = made(tiny, layer, [(5, 0)])
    seen = maps_of(tiny, layer, as_image(one.image))[0, 5].mean().item()
    assert one.activation == pytest.approx(2 * seen, rel=1e-4)
    assert seen > one.start / 2 and seen == pytest.approx(channel.activation, rel=0.2)


@pytest.fixture(scope="module")
def network() -> "pipeline.Network":
    from conftest import TinyNet

    torch.manual_seed(1)
    return pipeline.Network.of(TinyNet().eval(), input_size=64)


def test_a_grid_has_like_cells_where_the_photograph_is_alike(network: "pipeline.Network", tmp_path: Path) -> None:
    """Left stripes, right a plain color: cells within a half are alike, and unlike those of the other half."""
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[::4, :32] = halves[1::4, :32] = 255
    halves[:, 32:] = (200, 30, 60)
    grid = pipeline.activation_grid(
        network, "late", halves, cells=8, settings=["render.steps=24", "render.size=32"], progress=False
    )
    assert grid.cells.shape == (8, 8, 32, 32, 3) and grid.vectors.shape == (8, 8, 8)
    assert grid.image.shape == (256, 256, 3) and (grid.image[32:64, 96:128] == grid.cells[1, 3]).all()
    cells = grid.cells[2:6].astype(float)

    def apart(a: int, b: int) -> float:
        return float(np.abs(cells[:, a] - cells[:, b]).mean())

    assert apart(1, 2) < 0.2 * apart(2, 6) and apart(6, 5) < 0.2 * apart(2, 6)
    data = grid.save(tmp_path / "grid.png")
    with np.load(data, allow_pickle=False) as arrays:
        assert (arrays["cells"] == grid.cells).all() and arrays["strength"].shape == (8, 8)
    assert np.asarray(Image.open(tmp_path / "grid.png")).shape == (256, 256, 3)


def test_long_maps_are_averaged_to_the_number_of_cells(network: "pipeline.Network") -> None:
    grid = pipeline.activation_grid(
        network, "relu", photograph(side=64), cells=5, settings=["render.steps=2", "render.size=16"], progress=False
    )
    image = as_image(photograph(side=64))
    maps = maps_of(network.model, network.layer("relu"), image)[0]
    assert maps.shape[1:] == (32, 32) and grid.cells.shape[:2] == (5, 5)
    assert np.allclose(grid.vectors[0, 0], maps[:, :7, :7].mean(dim=(1, 2)), atol=1e-5)


def test_notebooks_accentuate_and_caricature_an_image(network: "pipeline.Network") -> None:
    small = ["render.steps=4"]
    one = pipeline.visualize(network, "late:3", "accentuate", small, progress=False, image=photograph(side=90))
    other = pipeline.visualize(network, "block:0", "caricature", small, progress=False, image=photograph(side=90))
    assert one.image.shape == other.image.shape == (64, 64, 3)
    with pytest.raises(AtlasError, match="uses no image"):
        pipeline.visualize(network, "late:3", image=photograph())
    with pytest.raises(AtlasError, match="give an image"):
        pipeline.visualize(network, "late:3", "accentuate")
    with pytest.raises(AtlasError, match="has no positions"):
        pipeline.activation_grid(network, "head", photograph())


def test_files_are_preprocessed_as_the_dataset_is(network: "pipeline.Network", photo_folder: Path) -> None:
    recipe = network.model.preprocessing
    examples = pipeline.dataset_examples(network, "late", photo_folder, k=1, progress=False)
    index = int(examples.index[0, 0])
    path = photo_folder / examples.paths[index]
    found = preprocess_photograph(ConfigFile(str(path)).read("x"), recipe, "x")
    assert (found == examples.image(0)).all()


def test_the_content_of_a_photograph_is_in_the_identity() -> None:
    layer = Layer("l", "conv", "l.bn", 1, "output", "BCHW", 8, 14, 14, 1.0)

    def digest(preset: str, content: bytes, path: str = "a.png") -> str:
        config = compose([f"render={preset}", "engine.precision=float32"]).config
        file, render_ = ConfigFile(path, content), config.render
        if preset == "caricature":
            render_ = dataclasses.replace(render_, objective=Caricature(file))
        else:
            render_ = dataclasses.replace(render_, canvas=FromImage(source=file))
        made = Setup(dataclasses.replace(config, render=render_), "0", (layer,), None, 1, "cpu")  # type: ignore[arg-type]
        return render_digest(made, layer, (64, 64), preset)

    for preset in ("caricature", "accentuate"):
        assert digest(preset, b"one") != digest(preset, b"two")
        assert digest(preset, b"one") == digest(preset, b"one", "elsewhere/a.png")


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["render=caricature", "render.objective.target=nowhere.jpg"], "can't be read: No such file"),
        (["render=caricature", "render.objective.target={}/text.jpg"], "render.objective.target"),
        (["render=caricature", "render.objective.target={}/gray.png"], "is gray, and the network takes colors"),
        (["render=accentuate", "render.canvas.source={}/gray.png"], "is gray, and the network takes colors"),
        (["render=caricature", "render.objective.target=dataset:label 1/02.png"], "has no image 'label 1/02.png'"),
        (["render/layer_penalties=[seed_distance]"], "they need render/canvas=image"),
        (["render=accentuate", "render.layer_penalties.seed_distance.layer=nose"], "there is no layer 'nose'"),
    ],
)
def test_photographs_that_cannot_be_used_are_refused_before_any_work(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], why: str
) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("L", (80, 60), 128).save(tmp_path / "gray.png")
    assert main(["run", *tiny_run, *(o.replace("{}", str(tmp_path)) for o in overrides)]) == 2
    assert why in capsys.readouterr().err and not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["layer=conv_stem"], "needs image="),
        (["layer=conv_stem", "image=nowhere.jpg"], "can't be read"),
        (["layer=conv_stam", "image={}/a.png"], "Nearest: conv_stem"),
        (["layer=conv_stem", "image={}/a.png", "out=grid.jpg"], "must be a .png file"),
        (["layer=conv_stem", "image={}/a.png", "cells=0"], "at least 1"),
        (["layer=classifier", "image={}/a.png"], "has no positions"),
    ],
)
def test_grids_that_cannot_be_made(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    Image.fromarray(photograph()).save(tmp_path / "a.png")
    assert main(["grid", *tiny_run, *(a.replace("{}", str(tmp_path)) for a in arguments)]) == 2
    assert why in capsys.readouterr().err


def test_a_grid_from_the_command_line(tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(photograph()).save(tmp_path / "a.png")
    out = tmp_path / "grid.png"
    assert main(["grid", *tiny_run, "layer=conv_stem", f"image={tmp_path / 'a.png'}", f"out={out}", "cells=2"]) == 0
    assert "2 x 2 cells of conv_stem" in capsys.readouterr().out
    assert np.asarray(Image.open(out)).shape == (64, 64, 3) and out.with_suffix(".npz").exists()


@pytest.mark.long
def test_a_run_holds_caricatures_and_accentuations_and_verifies(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the layer's mean and of a dataset example; both need results of the dataset pass or the dataset itself."""
    small = [*tiny_run, "layers.include=[conv_stem,blocks.1.0.*]", "layers.channels='0:1'"]
    also = ["also=[accentuate]", "also.accentuate.steps=3", "render=caricature", "run.check=6"]
    assert main(["run", *small, *also]) == 0
    assert main(["verify", str(tmp_path / "tiny"), "run.trust=true"]) == 0
    with pipeline.open_atlas(tmp_path / "tiny") as atlas:
        layer = atlas["conv_stem"]
        mean = layer.layer_mean()
        assert mean is not None and mean[0] == layer.stats()["mean"][0] and len(mean) > 1
        assert layer.presets == ("caricature", "accentuate") and layer.images().shape[:2] == (1, 1)
    again = [
        *small,
        "render=caricature",
        "render.objective.target='dataset:label 3/03.png'",
        "run.name=one",
        "run.check=2",
    ]
    assert main(["run", *again]) == 0
    assert main(["verify", str(tmp_path / "one"), "run.trust=true"]) == 0
    capsys.readouterr()
    assert main(["run", *again]) == 0
    assert "Nothing is missing" in capsys.readouterr().err


def test_directions_need_a_variant_for_each_row(tiny_layers: dict[str, Layer]) -> None:
    from pipeline.visualization.objectives import LayerInfo

    buffer = io.BytesIO()
    np.save(buffer, np.eye(3))
    objective = Directions(ConfigFile("x.npy", buffer.getvalue()))
    objective.check(LayerInfo("l", 3, False, {"l": 3}, 3))
    for channels, variants, why in ((4, 3, "needs 4"), (3, 1, "set render.variants=3")):
        with pytest.raises(AtlasError, match=why):
            objective.check(LayerInfo("l", channels, False, {"l": channels}, variants))
    maps = torch.randn(3, 3, 2, 2)
    found = objective.value(Activations(maps, torch.zeros(3, dtype=torch.long), torch.arange(3), 3))
    assert torch.allclose(found, torch.stack([maps[i, i].mean() for i in range(3)]))


def test_configurations_of_earlier_versions_lack_nothing() -> None:
    """A preset without regularizers in the space of a layer is stored as before: its run folders may go on."""
    assert "layer_penalties" not in compose(["render=tv"]).tree["render"]
    assert "layer_penalties" in compose(["render=accentuate"]).tree["render"]
