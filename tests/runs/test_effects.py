"""Effects in a run: added to a finished one, resumed, reused, in atlas.h5 and in plans."""

import base64
import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import compose

import pipeline
from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.planning.planner import make_plan
from pipeline.runs.artifacts import Artifacts
from pipeline.runs.dataset_pass import gaps

EFFECTS = ["effects.images=12", "effects.ablated=2", "effects.batch=4", "effects.examples=2"]
# Groups of atlas.h5 that effects add to.
OF_EFFECTS = ("effects", "examples/relevant", "dataset/shown", "attribut")


def digests(atlas: Path) -> dict[str, str]:
    """The content of every array of an atlas that is not about effects."""
    found: dict[str, str] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and not any(group in name for group in OF_EFFECTS):
            data = np.asarray(item[()])
            found[name] = hashlib.sha256(repr(data.tolist()).encode() if data.dtype == object else data).hexdigest()

    with h5py.File(atlas) as file:
        file.visititems(visit)
    return found


def test_effects_are_added_to_a_finished_run(
    finished: Path, tiny_run: list[str], capsys: pytest.CaptureFixture
) -> None:
    before = digests(finished / "atlas.h5")
    assert main(["plan", *tiny_run, *EFFECTS]) == 0
    assert "effects over 12 images: about" in capsys.readouterr().out
    assert (pd.read_csv(finished / "plan.csv")["kind"] == "effects").sum() == 1
    assert main(["run", *tiny_run, *EFFECTS]) == 0
    after = digests(finished / "atlas.h5")
    before.pop("provenance/config"), after.pop("provenance/config")
    assert before == after  # nothing else has changed
    with h5py.File(finished / "atlas.h5") as file:
        assert file["effects"].attrs["device"] == file["dataset"].attrs["device"] == "cpu"
    with pipeline.open_atlas(finished) as atlas:
        assert atlas.effects_outputs == "classifier" and len(atlas.effects_index) == len(atlas.effects_top) == 12
        assert atlas["classifier"].effects() is None  # the outputs themselves
        effects = atlas["blocks.1.0.conv_exp"].effects()
        assert effects is not None and effects.attribution.shape == (3, 12) and effects.ablated.tolist() == [0, 2]
        np.testing.assert_allclose(effects.mean, effects.attribution.mean(1), rtol=1e-4, atol=1e-9)
        assert (effects.size >= abs(effects.mean)).all() and 0.5 < effects.rank_correlation <= 1
        table = effects.on_outputs(2)
        assert len(table) == 1000 and table["effect"].is_monotonic_decreasing
        assert (table["low"] <= table["effect"]).all() and (table["effect"] <= table["high"]).all()
        # The two ways to the effect on the largest output of each image.
        row = effects.ablations["mean"]["top"][1]
        assert np.corrcoef(row, effects.attribution[2])[0, 1] > 0.5
        with pytest.raises(AtlasError, match=r"Channel 1 was not ablated \(ablated: 0, 2\)"):
            effects.on_outputs(1)
        check_relevant(atlas)
        units = atlas.units().set_index(["layer", "channel"])
        assert units.loc[("blocks.1.0.conv_exp", 2), "effect"] == pytest.approx(float(effects.mean[2]))
        assert units.loc["classifier"]["effect"].isna().all()
    assert main(["verify", str(finished)]) == 0
    assert main(["compact", str(finished)]) == 0
    capsys.readouterr()
    assert main(["plan", *tiny_run, *EFFECTS]) == 0
    assert "nothing is missing" in capsys.readouterr().out


def check_relevant(atlas: pipeline.Atlas) -> None:
    """The images that use each unit: among those that were measured, ordered, with masks, and to be seen."""
    assert atlas["classifier"].examples("relevant") is None
    shown = atlas.image_geometries()["index"].to_numpy()
    assert (np.diff(shown) > 0).all()
    listed = 0
    for layer in atlas:
        lists, masks = layer.examples("relevant"), layer.relevance_masks()
        if lists is None:
            continue
        assert masks is not None and lists.index.shape == (len(layer.channels), 2) == masks.shape[:2]
        for row, k in np.argwhere(lists.index >= 0).tolist():
            index = int(lists.index[row, k])
            assert index in atlas.effects_index and lists.value[row, k] > 0
            picture = atlas.source_image(index)
            assert picture is not None and picture.size[0] > 0  # decoded: its bytes are where the offsets say
            assert masks[row, k].max() in (0, 255)
            listed += 1
        ordered = lists.value[:, 0] >= np.nan_to_num(lists.value[:, 1], nan=-np.inf)
        assert (ordered | np.isnan(lists.value[:, 0])).all()
    assert listed > 4
    # The copies of all images belong to their numbers: each is that of a file.
    for index in shown.tolist():
        picture, (width, height) = atlas.source_image(index), atlas.image_geometry(index).size
        assert picture is not None and abs(picture.size[0] / picture.size[1] - width / height) < 0.05


@pytest.mark.long
def test_effects_continue_and_are_reused(
    finished: Path, tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["run", *tiny_run, *EFFECTS, "engine.task_seconds=0.01"]) == 0
    shards = sorted((finished / "shards" / "effects").glob("*.h5"))
    assert [path.name.split("-")[:2] for path in shards] == [["0", "4"], ["4", "8"], ["8", "12"]]
    with pipeline.open_atlas(finished) as atlas:
        first = [atlas["conv_stem"].effects(), atlas["conv_head"].effects()]
    shards[1].unlink()
    plan = make_plan(compose([*tiny_run, *EFFECTS]).config, timed=False)
    left = Artifacts(plan, compose(tiny_run).folder, read_only=True).effects
    assert gaps(left.ranges, left.total) == [(4, 8)] and not left.complete
    assert main(["run", *tiny_run, *EFFECTS]) == 0
    with pipeline.open_atlas(finished) as atlas:
        for one, other in zip(first, [atlas["conv_stem"].effects(), atlas["conv_head"].effects()], strict=True):
            assert one is not None and other is not None
            assert one.attribution.tobytes() == other.attribution.tobytes()
            for name in ("zero", "mean"):
                for key in ("top", "mean", "sd"):
                    assert one.ablations[name][key].tobytes() == other.ablations[name][key].tobytes()
    # A run beside it takes them.
    capsys.readouterr()
    beside = [option.replace("run.name=tiny", "run.name=beside") for option in tiny_run]
    assert main(["run", *beside, *EFFECTS]) == 0
    assert "Reusing the effects" in capsys.readouterr().err
    for kind in ("effects", "relevance"):
        names = {path.name for path in (tmp_path / "beside" / "shards" / kind).glob("*.h5")}
        assert names == {path.name for path in (finished / "shards" / kind).glob("*.h5")} and len(names) > 1


@pytest.mark.long
def test_connections_are_attributed_and_continue(
    finished: Path, tiny_run: list[str], capsys: pytest.CaptureFixture
) -> None:
    asked = [*tiny_run, *EFFECTS, "effects.connections=6"]
    assert main(["run", *asked, "engine.task_seconds=0.01"]) == 0
    shards = sorted((finished / "shards" / "connections").glob("*.h5"))
    assert [path.name.split("-")[:2] for path in shards] == [["0", "4"], ["4", "6"]]
    with pipeline.open_atlas(finished) as atlas:
        before = {layer.name: layer.attributed_connections("inputs") for layer in atlas}
        for name, found in before.items():
            if found is None:
                continue
            layer, source = atlas[name], atlas[found.layer]
            assert found.images == 6 and found.channel.shape == found.value.shape == (len(layer.channels), 8)
            assert (np.diff(np.abs(found.value), axis=1) <= 0).all()
            wiring = layer.connectivity("inputs")
            assert wiring is not None and wiring.attribution is not None and wiring.layer == found.layer
            # The same numbers beside the strongest connections by weights.
            pairs = {
                (r, c): v
                for r, row in enumerate(found.channel.tolist())
                for c, v in zip(row, found.value[r], strict=True)
            }
            for r, k in np.argwhere(wiring.channel >= 0).tolist():
                assert pairs.get((r, int(wiring.channel[r, k])), wiring.attribution[r, k]) == wiring.attribution[r, k]
            back = source.attributed_connections("outputs")
            assert back is not None and set(back.channel.ravel().tolist()) <= {-1, *layer.channels.tolist()}
        assert sum(found is not None for found in before.values()) >= 3
    shards[1].unlink()
    (finished / "atlas.h5").unlink()
    assert main(["run", *asked]) == 0  # the other division is kept, and the rest measured again
    with pipeline.open_atlas(finished) as atlas:
        for name, found in before.items():
            again = atlas[name].attributed_connections("inputs")
            assert (found is None) == (again is None)
            assert found is None or again is None or found.value.tobytes() == again.value.tobytes()
    assert main(["verify", str(finished)]) == 0
    assert main(["compact", str(finished)]) == 0
    capsys.readouterr()
    assert main(["plan", *asked]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    (path,) = (finished / "site" / "api" / "v1").rglob("blocks.1.0.conv_pwl*.json")
    for unit in json.loads(path.read_text())["units"]:
        assert len(unit["wiring"]["inputs"]["attribution"]) == len(unit["wiring"]["inputs"]["units"])
        assert unit["attributed"]["inputs"]["images"] == 6


@pytest.mark.long
def test_other_lists_repeat_no_effects(finished: Path, tiny_run: list[str], capsys: pytest.CaptureFixture) -> None:
    """A lost part of the second round is measured again; more images per unit repeat the second round only."""
    small = [*tiny_run, *EFFECTS, "engine.task_seconds=0.01"]
    assert main(["run", *small]) == 0
    with pipeline.open_atlas(finished) as atlas:
        first = atlas["conv_head"].relevance_masks()
    parts = sorted(path for path in (finished / "shards" / "relevance").glob("*.h5") if "index" not in path.name)
    assert len(parts) > 1
    parts[0].unlink()
    assert main(["run", *small]) == 0
    with pipeline.open_atlas(finished) as atlas:
        second = atlas["conv_head"].relevance_masks()
    assert first is not None and second is not None and first.tobytes() == second.tobytes()
    capsys.readouterr()
    assert main(["run", *small, "effects.examples=3", "run.update=true"]) == 0
    assert "effects 0 of" not in capsys.readouterr().err
    with pipeline.open_atlas(finished) as atlas:
        lists = atlas["conv_head"].examples("relevant")
        assert lists is not None and lists.index.shape[1] == 3


@pytest.mark.long
def test_a_damaged_part_is_measured_again(finished: Path, tiny_run: list[str]) -> None:
    assert main(["run", *tiny_run, *EFFECTS]) == 0
    with pipeline.open_atlas(finished) as atlas:
        before = atlas["conv_head"].effects()
    (path,) = (finished / "shards" / "effects").glob("*.h5")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(data)
    (finished / "atlas.h5").unlink()
    assert main(["run", *tiny_run, *EFFECTS]) == 0
    with pipeline.open_atlas(finished) as atlas:
        after = atlas["conv_head"].effects()
    assert before is not None and after is not None
    assert before.attribution.tobytes() == after.attribution.tobytes()


@pytest.mark.long
def test_images_that_use_a_unit_are_shown_as_crops(finished: Path, tiny_run: list[str]) -> None:
    """Where an atlas stores no whole images: each receptive field at the largest relevance, also on the site."""
    assert main(["run", *tiny_run, *EFFECTS, "examples.store=crops", "run.update=true"]) == 0
    shown = 0
    with pipeline.open_atlas(finished) as atlas:
        for name in ("conv_stem", "conv_head"):
            layer = atlas[name]
            lists = layer.examples("relevant")
            assert lists is not None and layer.crop(-1, "relevant") is None
            numbers = lists.crop[lists.index >= 0]
            assert sorted(numbers.tolist()) == list(range(len(numbers))) and (lists.crop[lists.index < 0] == -1).all()
            for row, k in np.argwhere(lists.index >= 0).tolist():
                crop = layer.crop(int(lists.crop[row, k]), "relevant")
                box = layer.crop_box(int(lists.y[row, k]), int(lists.x[row, k])) or (0, 0, *layer.input_size)
                assert crop is not None
                assert crop.size[0] / crop.size[1] == pytest.approx((box[2] - box[0]) / (box[3] - box[1]), rel=0.1)
                shown += 1
            (path,) = (finished / "site" / "api" / "v1").rglob(f"{name}*.json")
            entries = [e for unit in json.loads(path.read_text())["units"] for e in unit["examples"]["relevant"]]
            assert len(entries) == len(numbers) and all(entry[5] >= 0 for entry in entries)
    assert shown > 4
    assert main(["verify", str(finished)]) == 0


@pytest.mark.parametrize(
    ("network", "layers", "used"),
    [
        ("test_efficientnet", "conv_stem,blocks.1.0.*", True),
        # Without weights the branches of its residual blocks are multiplied by zero: no unit has a positive relevance.
        ("resnet18", "layer1.0.conv1,layer4.1.conv1", False),
    ],
)
@pytest.mark.long
def test_a_network_without_a_classifier(
    network: str, layers: str, used: bool, tiny_run: list[str], tmp_path: Path
) -> None:
    """The outputs are the means of its last layer's channels; a run ends also if no image uses a unit."""
    own = [f"model.name={network}", "model.arguments={num_classes: 0}", f"layers.include=[{layers}]"]
    assert main(["run", *tiny_run, *own, *EFFECTS]) == 0
    with pipeline.open_atlas(tmp_path / "tiny") as atlas:
        assert atlas.effects_outputs and not atlas.labels and len(atlas.effects_index) == 12
        name = list(atlas.layers)[-1]
        effects, lists = atlas[name].effects(), atlas[name].examples("relevant")
        assert effects is not None and effects.attribution.any() == used == (lists is not None)
        outputs = effects.ablations["zero"]["mean"].shape[1]
        assert outputs == effects.on_outputs(int(effects.ablated[0])).shape[0] > 3
    (path,) = (tmp_path / "tiny" / "site" / "api" / "v1").rglob(f"{name}*.json")
    record = json.loads(path.read_text())["units"][0]["effects"]
    assert record["images"] == 12 and ("raises" in record)
    assert main(["verify", str(tmp_path / "tiny")]) == 0


def test_bad_settings(tiny_run: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *tiny_run, "effects.images=-1"]) == 2
    assert "effects.images" in capsys.readouterr().err


def test_effects_are_on_the_page_of_a_unit(finished: Path, tiny_run: list[str]) -> None:
    """The records of the API, which the pages are drawn from."""
    assert main(["run", *tiny_run, *EFFECTS]) == 0
    with pipeline.open_atlas(finished) as atlas:
        effects, names = atlas["conv_head"].effects(), atlas.labels
    assert effects is not None
    (path,) = (finished / "site" / "api" / "v1").rglob("conv_head*.json")
    units = {unit["channel"]: unit["effects"] for unit in json.loads(path.read_text())["units"]}
    assert "raises" in units[0] and "raises" not in units[1]
    assert units[1]["mean"] == pytest.approx(float(effects.mean[1]), rel=1e-6) and units[1]["images"] == 12
    with pipeline.open_atlas(finished) as atlas:
        lists, masks = atlas["conv_head"].examples("relevant"), atlas["conv_head"].relevance_masks()
    assert lists is not None and masks is not None
    for row, unit in enumerate(json.loads(path.read_text())["units"]):
        images = [entry[1] for entry in unit["examples"]["relevant"]]
        assert images == [i for i in lists.index[row].tolist() if i >= 0] and len(set(images)) == len(images)
        for k, image in enumerate(images):
            coded = base64.b64decode(unit["masks"]["values"][str(image)])
            assert coded == masks[row, k].tobytes() and unit["masks"]["size"] == list(masks.shape[2:])
    table = effects.on_outputs(2)
    for entry, row in ((units[2]["raises"][0], table.iloc[0]), (units[2]["lowers"][0], table.iloc[-1])):
        name = names[int(row["output"])] if names else str(int(row["output"]))
        assert entry[0] == name and entry[1:] == pytest.approx([row["effect"], row["low"], row["high"]], rel=1e-3)
