"""Display images: chosen units once more on a larger canvas, beside the measured images."""

import json

import numpy as np
import pytest
from PIL import Image

from pipeline.cli.main import main
from pipeline.planning.folder import RunFolder
from pipeline.store.reader import open_atlas

LAYER, CHANNEL, SIZE = "blocks.1.0.conv_pwl", 1, 64


@pytest.mark.long
def test_display_images_stand_beside_the_measured_ones(finished, tiny_run):
    with open_atlas(finished) as before:
        images = {layer.name: layer.images()[:] for layer in before}
        table = before.units()
    chosen = f"display.units=[{LAYER}:{CHANNEL}]"
    assert main(["run", *tiny_run, chosen, f"display.size={SIZE}"]) == 0
    with open_atlas(finished) as after:
        # No measured image, and no number of one, differs.
        assert all(np.array_equal(layer.images()[:], images[layer.name]) for layer in after)
        assert after.units().drop(columns="trace", errors="ignore").equals(table.drop(columns="trace", errors="ignore"))
        assert [layer.name for layer in after if layer.displays] == [LAYER]
        layer = after[LAYER]
        (name,) = layer.displays.values()
        assert layer.displays == {layer.presets[0]: name} and name not in layer.presets
        assert layer.images(name).shape[2:4] == (SIZE, SIZE)
        status = layer.measurements(name, ("status",))["status"][:, 0]
        assert [c for c, one in zip(layer.channels, status, strict=True) if one != "missing"] == [CHANNEL]
        keys = [layer.render_attributes(key)["digest"] for key in (layer.presets[0], name)]
        assert keys[0] != keys[1]
        seeds = [layer.measurements(key, ("seed",))["seed"][layer.row(CHANNEL), 0] for key in (layer.presets[0], name)]
        assert seeds[0] == seeds[1]
        stored = layer.image(CHANNEL, name)
    # The site has it at its size, where the API says.
    site = finished / "site"
    units = json.loads((site / "api/v1/units" / f"{LAYER}.json").read_text())["units"]
    files = {unit["channel"]: unit["images"]["distill"].get("display") for unit in units}
    assert [channel for channel, file in files.items() if file] == [CHANNEL]
    shown = np.asarray(Image.open(site / files[CHANNEL]).convert("RGB"), float)
    assert shown.shape == stored.shape and np.abs(shown - stored).mean() < 12
    assert main(["verify", *tiny_run]) == 0


@pytest.mark.long
def test_display_images_are_kept_by_compaction_and_made_once(finished, tiny_run):
    chosen = [f"display.units=[{LAYER}:{CHANNEL}]", f"display.size={SIZE}"]
    assert main(["run", *tiny_run, *chosen]) == 0
    atlas = RunFolder(finished).atlas
    with open_atlas(finished) as opened:
        identity = opened.attributes["identity"]
        image = opened[LAYER].image(CHANNEL, "distill-display")
    assert main(["compact", *tiny_run, *chosen]) == 0
    assert main(["run", *tiny_run, *chosen]) == 0
    with open_atlas(atlas) as opened:
        assert opened.attributes["identity"] == identity
        assert np.array_equal(opened[LAYER].image(CHANNEL, "distill-display"), image)


@pytest.mark.long
def test_the_wall_has_display_images_once_there_is_an_atlas(finished, tiny_run):
    assert main(["run", *tiny_run, "display.units=wall", f"display.size={SIZE}"]) == 0
    with open_atlas(finished) as opened:
        assert all(layer.displays for layer in opened if layer.presets)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("display.units=[blocks.1.0.conv_pwl:99]", "blocks.1.0.conv_pwl:99 is not among the units"),
        ("display.units=[conv_stem]", "is not a unit"),
        ("display.units=some", "use all, wall, a list"),
        ("display.units=wall", "has no atlas.h5 yet"),
    ],
)
def test_wrong_units_are_refused_before_any_work(tiny_run, capsys, settings, message):
    assert main(["plan", *tiny_run, settings]) != 0
    assert message in capsys.readouterr().err


def test_a_network_that_refuses_the_size_says_so(photo_folder, tmp_path, capsys):
    asked = ["model=timm", "model.name=test_vit3", "model.weights=null", "layers=blocks", "layers.channels=0:1"]
    data = ["data=folder", f"data.root={photo_folder}", f"run.root={tmp_path}", "run.name=vit", "engine=inline"]
    assert main(["plan", *asked, *data, "render=fast", "display.units=all"]) != 0
    assert "display.size=512: test_vit3 does not accept images of 512 x 512 pixels" in capsys.readouterr().err
