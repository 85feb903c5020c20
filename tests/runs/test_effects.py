"""Effects in a run: added to a finished one, resumed, reused, in atlas.h5 and in plans."""

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

EFFECTS = ["effects.images=12", "effects.ablated=2", "effects.batch=4"]


def digests(atlas: Path) -> dict[str, str]:
    """The content of every array of an atlas that is not about effects."""
    found: dict[str, str] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and "effects" not in name:
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
        units = atlas.units().set_index(["layer", "channel"])
        assert units.loc[("blocks.1.0.conv_exp", 2), "effect"] == pytest.approx(float(effects.mean[2]))
        assert units.loc["classifier"]["effect"].isna().all()
    assert main(["verify", str(finished)]) == 0
    assert main(["compact", str(finished)]) == 0
    capsys.readouterr()
    assert main(["plan", *tiny_run, *EFFECTS]) == 0
    assert "nothing is missing" in capsys.readouterr().out


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
    names = {path.name for path in (tmp_path / "beside" / "shards" / "effects").glob("*.h5")}
    assert names == {path.name for path in (finished / "shards" / "effects").glob("*.h5")}


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
    table = effects.on_outputs(2)
    for entry, row in ((units[2]["raises"][0], table.iloc[0]), (units[2]["lowers"][0], table.iloc[-1])):
        name = names[int(row["output"])] if names else str(int(row["output"]))
        assert entry[0] == name and entry[1:] == pytest.approx([row["effect"], row["low"], row["high"]], rel=1e-3)
