"""Activation atlases in a run: added to a finished one, in any division, resumed, reused, in atlas.h5 and in plans."""

import hashlib
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
from pipeline.store import hdf5, shards

LAYER = "blocks.1.0.conv_exp"
ATLAS = [
    f"activation_atlas.layers=[{LAYER},classifier]",
    "activation_atlas.positions=2",
    "activation_atlas.grid=4",
    "activation_atlas.steps=2",
    "activation_atlas.size=32",
]


def digests(path: Path, within: bool) -> dict[str, str]:
    """The content of every array of an atlas that is, or is not, of an activation atlas."""
    found: dict[str, str] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and ("activation_atlas" in name) == within:
            data = np.asarray(item[()])
            found[name] = hashlib.sha256(repr(data.tolist()).encode() if data.dtype == object else data).hexdigest()

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


@pytest.mark.long
def test_an_activation_atlas_is_added_to_a_finished_run(
    finished: Path, tiny_run: list[str], capsys: pytest.CaptureFixture
) -> None:
    before = digests(finished / "atlas.h5", within=False)
    assert main(["plan", *tiny_run, *ATLAS]) == 0
    printed = capsys.readouterr().out
    assert f"activation atlas (20 images; about 10 cells of {LAYER}, 10 cells of classifier): about" in printed
    assert (pd.read_csv(finished / "plan.csv")["kind"] == "activation atlas").sum() == 1
    assert main(["run", *tiny_run, *ATLAS]) == 0
    after = digests(finished / "atlas.h5", within=False)
    before.pop("provenance/config"), after.pop("provenance/config")
    assert before == after  # nothing else has changed
    with pipeline.open_atlas(finished) as atlas:
        assert atlas["conv_stem"].activation_atlas() is None
        found = atlas[LAYER].activation_atlas()
        assert found is not None and found.images.shape == (len(found.count), 32, 32, 3)
        assert len(found.image) == 40 and found.count.sum() == (found.cell >= 0).sum()
        assert found.sheet.shape == (32 * found.grid[0], 32 * found.grid[1], 3)
        first = int(found.top[0])
        assert found.share(first) @ found.count == ((found.top == first) & (found.cell >= 0)).sum()
        assert found.samples(0)["image"].tolist() == found.image[found.cell == 0].tolist()
        extent = atlas[LAYER].activation_atlas_extent
        assert extent is not None and (extent.cells, extent.samples, extent.images) == (len(found.count), 40, 20)
        logits = atlas["classifier"].activation_atlas()
        assert logits is not None and len(logits.image) == 20  # one position
    assert main(["verify", str(finished)]) == 0
    assert main(["compact", str(finished)]) == 0
    capsys.readouterr()
    assert main(["plan", *tiny_run, *ATLAS]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    # Without it, atlas.h5 is as before.
    assert main(["run", *tiny_run]) == 0
    assert digests(finished / "atlas.h5", within=True) == {}


@pytest.mark.long
def test_any_division_and_any_interruption_give_the_same_bytes(
    finished: Path, tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["run", *tiny_run, *ATLAS, "engine.task_seconds=0.01"]) == 0
    samples = sorted((finished / "shards" / "samples").glob("*.h5"))
    cells = sorted((finished / "shards" / "cells" / LAYER).glob("*.h5"))
    assert len(samples) == 5 and len(cells) > 2
    first = digests(finished / "atlas.h5", within=True)
    assert len(first) > 30
    samples[1].unlink(), cells[1].unlink(), cells[2].unlink()
    plan = make_plan(compose([*tiny_run, *ATLAS]).config, timed=False)
    left = Artifacts(plan, compose(tiny_run).folder, read_only=True).activation_atlas
    assert left.missing == 4 and left.missing_items[LAYER] == 4 and not left.complete
    (finished / "atlas.h5").unlink()
    assert main(["run", *tiny_run, *ATLAS]) == 0  # in larger parts
    assert digests(finished / "atlas.h5", within=True) == first
    # A run beside it takes all of it.
    capsys.readouterr()
    beside = [option.replace("run.name=tiny", "run.name=beside") for option in tiny_run]
    assert main(["run", *beside, *ATLAS]) == 0
    assert "Reusing the activation atlas" in capsys.readouterr().err
    assert digests(tmp_path / "beside" / "atlas.h5", within=True) == first
    for kind in ("samples", "layouts", f"cells/{LAYER}"):
        names = {path.name for path in (tmp_path / "beside" / "shards" / kind).glob("*.h5")}
        assert names and names <= {path.name for path in (finished / "shards" / kind).glob("*.h5")}


@pytest.mark.long
def test_damaged_cells_are_made_again(finished: Path, tiny_run: list[str]) -> None:
    assert main(["run", *tiny_run, *ATLAS]) == 0
    first = digests(finished / "atlas.h5", within=True)
    path = next((finished / "shards" / "cells" / LAYER).glob("*.h5"))
    shard = shards.read(path)
    assert shard is not None
    arrays = shard.arrays()
    digest = arrays.pop("images_sha256")
    arrays["images"] = 255 - arrays["images"]
    path.unlink()
    with h5py.File(path, "w") as file:
        for name, array in (arrays | {"images_sha256": digest}).items():
            hdf5.write_array(file, name, array)
        file.attrs.update(shard.attributes)
    assert main(["verify", str(finished)]) == 1
    (finished / "atlas.h5").unlink()
    assert main(["run", *tiny_run, *ATLAS]) == 0
    assert digests(finished / "atlas.h5", within=True) == first
    assert len(list(path.parent.glob("*.damaged*"))) == 1
    assert main(["repair", str(finished)]) == 0 and main(["verify", str(finished)]) == 0


@pytest.mark.long
def test_a_changed_image_in_the_file_is_found_and_repaired(finished: Path, tiny_run: list[str]) -> None:
    assert main(["run", *tiny_run, *ATLAS]) == 0
    first = digests(finished / "atlas.h5", within=True)
    with h5py.File(finished / "atlas.h5", "r+") as file:
        images = file[f"layers/{LAYER}/activation_atlas/images"]
        assert isinstance(images, h5py.Dataset)
        images[1] = 255 - images[1]
    assert main(["verify", str(finished)]) == 1
    assert main(["repair", str(finished)]) == 0
    assert main(["run", *tiny_run, *ATLAS]) == 0
    assert digests(finished / "atlas.h5", within=True) == first and main(["verify", str(finished)]) == 0


@pytest.mark.long
def test_other_cells_repeat_no_samples(finished: Path, tiny_run: list[str]) -> None:
    assert main(["run", *tiny_run, *ATLAS]) == 0
    samples = {path: path.stat().st_mtime_ns for path in (finished / "shards" / "samples").glob("*.h5")}
    assert main(["run", *tiny_run, *ATLAS, "activation_atlas.grid=2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (finished / "shards" / "samples").glob("*.h5")} == samples
    with pipeline.open_atlas(finished) as atlas:
        found = atlas[LAYER].activation_atlas()
        assert found is not None and max(found.grid) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["activation_atlas.layers=[blocks.9]"], "no layer of this run that gets visualizations matches 'blocks.9'"),
        (["activation_atlas.layers=[classifier]", "activation_atlas.grid=1000"], "activation_atlas.grid"),
        (["activation_atlas.layers=[classifier]", "activation_atlas.positions=0"], "activation_atlas.positions"),
        (
            ["activation_atlas.layers=[classifier]", "render/canvas=image", "render.canvas.source=best"],
            "cells start from noise",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(tiny_run: list[str], options: list[str], message: str) -> None:
    with pytest.raises(AtlasError, match=message):
        make_plan(compose([*tiny_run, *options]).config, timed=False)
