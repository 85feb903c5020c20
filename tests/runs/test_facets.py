"""Facets in a run: added to a finished one, in any division, resumed, reused, in atlas.h5 and in plans."""

import hashlib
import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import compose
from PIL import Image

import pipeline
from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.planning.planner import make_plan
from pipeline.runs.artifacts import Artifacts

LAYER = "blocks.1.0.conv_exp"
FACETS = [f"facets.layers=[{LAYER},classifier]", "facets.least=8", "facets.steps=2", "facets.size=32"]


def digests(path: Path, within: bool) -> dict[str, str]:
    """The content of every array of an atlas that is, or is not, of facets."""
    found: dict[str, str] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and ("/facets/" in name) == within:
            data = np.asarray(item[()])
            found[name] = hashlib.sha256(repr(data.tolist()).encode() if data.dtype == object else data).hexdigest()

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


@pytest.mark.long
def test_facets_are_added_to_a_finished_run(finished: Path, tiny_run: list[str], capsys: pytest.CaptureFixture) -> None:
    before = digests(finished / "atlas.h5", within=False)
    assert main(["plan", *tiny_run, *FACETS]) == 0
    assert f"facets (20 images; about 4 of {LAYER}, 4 of classifier): about" in capsys.readouterr().out
    assert (pd.read_csv(finished / "plan.csv")["kind"] == "facets").sum() == 1
    assert main(["run", *tiny_run, *FACETS]) == 0
    after = digests(finished / "atlas.h5", within=False)
    before.pop("provenance/config"), after.pop("provenance/config")
    assert before == after  # nothing else has changed
    with pipeline.open_atlas(finished) as atlas:
        assert atlas["conv_stem"].facets() is None
        view = atlas[LAYER]
        found = view.facets()
        assert found is not None and found.channel.tolist() == view.channels.tolist()
        assert found.embedding not in (LAYER, "classifier") and found.images.shape == (len(found.unit), 32, 32, 3)
        # The examples are the list by the mean, as far as that goes.
        best = view.examples("mean")
        assert best is not None
        shared = min(best.index.shape[1], found.image.shape[1])
        assert found.image[:, :shared].tolist() == best.index[:, :shared].tolist()
        assert found.value[:, :shared] == pytest.approx(best.value[:, :shared], rel=1e-3, abs=1e-4)
        rows = found.of_unit(int(view.channels[0]))
        table = found.examples(int(view.channels[0]))
        assert len(table) == 8 and table["facet"].nunique() == len(rows) == found.count[0]
        assert found.size[rows].sum() == 8
        assert set(found.nearest[rows[0]][found.nearest[rows[0]] >= 0]) <= set(table["image"])
        assert found.thumbnails is not None and found.thumbnails.shape[:2] == found.nearest.shape
        assert (found.thumbnails.any((2, 3, 4)) == (found.nearest >= 0)).all()
        units = atlas.units()
        assert units.loc[units["layer"] == LAYER, "facets"].tolist() == found.count.tolist()
        logits = atlas["classifier"].facets()
        assert logits is not None and logits.embedding == found.embedding
        scores = found.monosemanticity
        assert found.score == pytest.approx(np.nanmedian(scores), nan_ok=True)
    site = finished / "site"
    units = json.loads((site / "api" / "v1" / "units" / f"{LAYER}.json").read_text())["units"]
    assert [len(unit["facets"]["facets"]) for unit in units] == found.count.tolist()
    first = units[0]["facets"]["facets"][0]
    assert first["size"] == found.size[0] and len(first["nearest"]) == min(8, (found.nearest[0] >= 0).sum())
    sheets = list((site / "media" / f"facets-{LAYER}").iterdir())
    assert len(sheets) == 1
    with Image.open(sheets[0]) as sheet:
        assert sheet.size == (112 * 9, 112 * len(found.unit))
    assert "<dt>Facets</dt>" in (site / "layers" / f"{LAYER}.html").read_text()
    assert "<dt>Facets</dt>" not in (site / "layers" / "conv_stem.html").read_text()
    assert main(["verify", str(finished)]) == 0
    capsys.readouterr()
    assert main(["plan", *tiny_run, *FACETS]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    # Without them, atlas.h5 is as before.
    assert main(["run", *tiny_run]) == 0
    assert digests(finished / "atlas.h5", within=True) == {}


@pytest.mark.long
def test_any_division_and_any_interruption_give_the_same_bytes(
    finished: Path, tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = [*FACETS, "examples.batch=4"]
    assert main(["run", *tiny_run, *options, "engine.task_seconds=0.01", "engine.batch=2"]) == 0
    responses = sorted((finished / "shards" / "responses").glob("*.h5"))
    images = sorted((finished / "shards" / "facets" / LAYER).glob("*.h5"))
    assert len(responses) == 5 and len(images) > 1
    first = digests(finished / "atlas.h5", within=True)
    assert len(first) > 30
    responses[1].unlink(), images[1].unlink()
    plan = make_plan(compose([*tiny_run, *options]).config, timed=False)
    left = Artifacts(plan, compose(tiny_run).folder, read_only=True).facets
    assert left.missing == 4 and left.missing_items[LAYER] > 0 and not left.complete
    (finished / "atlas.h5").unlink()
    for kind in ("responses", "facets/classifier", "facet_groups"):
        for path in (finished / "shards" / kind).glob("*.h5"):
            path.unlink()
    assert main(["run", *tiny_run, *options, "engine.batch=2"]) == 0  # in larger parts
    assert digests(finished / "atlas.h5", within=True) == first
    # A run beside it takes all of them.
    capsys.readouterr()
    beside = [option.replace("run.name=tiny", "run.name=beside") for option in tiny_run]
    assert main(["run", *beside, *options, "engine.batch=2"]) == 0
    assert "Reusing the facets" in capsys.readouterr().err
    assert digests(tmp_path / "beside" / "atlas.h5", within=True) == first


def test_a_changed_image_in_the_file_is_found(finished: Path, tiny_run: list[str]) -> None:
    assert main(["run", *tiny_run, *FACETS]) == 0
    with h5py.File(finished / "atlas.h5", "r+") as file:
        images = file[f"layers/{LAYER}/facets/images"]
        assert isinstance(images, h5py.Dataset)
        images[1] = 255 - images[1]
    assert main(["verify", str(finished)]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["facets.layers=[blocks.9]"], "no layer of this run that gets visualizations matches 'blocks.9'"),
        (["facets.layers=[classifier]", "facets.level=1.5"], "facets.level"),
        (["facets.layers=[classifier]", "facets.embedding=classifier"], "has facets itself"),
        (["facets.layers=[classifier]", "facets.embedding=nothing"], "there is no layer 'nothing'"),
        (["facets.layers=[classifier]", "data.limit=10"], "at least 16 dataset images"),
        (
            ["facets.layers=[classifier]", "render/canvas=image", "render.canvas.source=best"],
            "start from spectra",
        ),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(tiny_run: list[str], options: list[str], message: str) -> None:
    with pytest.raises(AtlasError, match=message):
        make_plan(compose([*tiny_run, *options]).config, timed=False)
