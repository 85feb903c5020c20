"""Runs whose pictures begin with photographs, spectra of one's own, and presets that a network can't serve."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipeline
from pipeline.cli.main import main


def test_pictures_begin_with_each_units_best_example(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a step of no size the picture *is* the best example's part around what excited the unit."""
    still = [*tiny_run, "render=image_prior", "render/optimizer=sgd", "render.optimizer.lr=1e-9", "render.attempts=1",
             "render.steps=2", "render.size=32", "render.margin=0", "layers.include=[conv_stem]"]  # fmt: skip
    assert main(["render", *still]) == 2
    assert "needs the dataset pass first" in capsys.readouterr().err
    assert main(["run", *still]) == 0
    with pipeline.open_atlas(tmp_path / "tiny") as atlas:
        layer = atlas["conv_stem"]
        best = layer.examples("max")
        assert best is not None
        for channel in layer.channels:
            row = layer.row(channel)
            photo = atlas.input_image(int(best.index[row, 0]))
            assert photo is not None
            whole = np.asarray(photo.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
            picture = layer.image(channel).astype(int)
            y = min(max(round((best.y[row, 0] + 0.5) / layer.map_size[0] * 64 - 16), 0), 32)
            x = min(max(round((best.x[row, 0] + 0.5) / layer.map_size[1] * 64 - 16), 0), 32)
            assert np.abs(picture - whole[y : y + 32, x : x + 32]).max() <= 1
    capsys.readouterr()
    assert main(["run", *still]) == 0
    assert "Nothing is missing" in capsys.readouterr().err


@pytest.mark.long
def test_a_spectrum_of_ones_own_photographs(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.npz"
    assert main(["spectrum", *tiny_run, f"out={mine}"]) == 0
    assert "20 of 20 images, 64 x 64 pixels" in capsys.readouterr().out
    with np.load(mine, allow_pickle=False) as arrays:
        assert arrays["amplitude"].shape == (3, 64, 33) and arrays["colour"].shape == (3, 3)
    maco = [*tiny_run, "render=maco", "render.steps=2", "layers.include=[conv_stem]"]
    assert main(["run", *maco, f"render.canvas.spectrum={mine}"]) == 0
    # Another content under the same name is another picture.
    assert main(["spectrum", *tiny_run, "data.limit=10", f"out={mine}"]) == 0
    capsys.readouterr()
    assert main(["run", *maco, f"render.canvas.spectrum={mine}"]) == 0
    assert "Nothing is missing" not in capsys.readouterr().err
    assert main(["spectrum", *tiny_run]) == 2


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["render/objective=interpolate"], "needs a second unit, as layer:channel"),
        (["render/objective=probability"], "needs the classifier's logits, which conv_stem does not hold"),
        (["render=oygard"], "predicts the classes of the network, and conv_stem does not hold their logits"),
        (["render=maco", "render.canvas.spectrum=nowhere.npz"], "can't be read: No such file"),
        (["render/canvas=image", "render.canvas.source=nowhere.jpg"], "can't be read: No such file"),
        (["render/objective=direction", "render.objective.vectors=nowhere.npy"], "can't be read: No such file"),
        (
            ["render/couplings=[diversity]", "render.variants=2", "render.couplings.diversity.layer=nose"],
            "no layer 'nose'",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_any_work(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], why: str
) -> None:
    assert main(["run", *tiny_run, *overrides]) == 2
    assert why in capsys.readouterr().err and not (tmp_path / "tiny").exists()


def test_directions_and_whole_layers_have_as_many_pictures_as_they_need(tiny_run: list[str], tmp_path: Path) -> None:
    np.save(tmp_path / "two.npy", np.random.default_rng(0).normal(size=(2, 8)))
    run = [*tiny_run, "layers.include=[conv_stem]", "render.steps=2"]
    assert main(["run", *run, "render/objective=direction", f"render.objective.vectors={tmp_path / 'two.npy'}"]) in (
        0,
        2,
    )
    assert main(["run", *run, "render/objective=layer", "run.name=whole"]) == 0
    with pipeline.open_atlas(tmp_path / "whole") as atlas:
        assert list(atlas["conv_stem"].channels) == [0]


def test_a_picture_that_is_none_is_said(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    arguments = [*tiny_run, "render/canvas=image", f"render.canvas.source={tmp_path / 'text.jpg'}"]
    assert main(["run", *arguments]) == 2
    assert "is not an image" in capsys.readouterr().err
    Image.new("RGB", (80, 60), "red").save(tmp_path / "red.png")
    assert main(["run", *tiny_run, "render/canvas=image", f"render.canvas.source={tmp_path / 'red.png'}",
                     "layers.include=[conv_stem]"]) == 0  # fmt: skip
