"""Units that noise does not reach start once more from their best dataset example, and the others say why not."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import pipeline
from pipeline.cli.main import main
from pipeline.engine.worker import _restarted_arrays
from pipeline.store import shards
from pipeline.visualization.evaluation import SILENT
from pipeline.visualization.initial_images import NO_EXAMPLE

# Channel 0 answers to anything, 1 only to a strong step from dark to bright, 2 to nothing. `maximum` has no gradient
# below the threshold, and none that is redirected as that of a rectifier is.
NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 8, stride=4, bias=False)
        step = torch.ones(3, 8, 8) / 96
        step[:, :, :4] *= -1
        with torch.no_grad():
            self.conv.weight.copy_(torch.stack([step, step, step]))
        self.register_buffer("threshold", torch.tensor([-2.0, 0.45, 2.0])[:, None, None])
        self.act = nn.ReLU()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        maps = self.act(torch.maximum(self.conv(x), self.threshold) - self.threshold)
        return self.head(maps.mean((2, 3)))
"""


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """A run of the network on images with one vertical edge each, the strongest in the last one."""
    (tmp_path / "net.py").write_text(NETWORK)
    (tmp_path / "images").mkdir()
    for i in range(8):
        pixels = np.full((32, 32, 3), 128, np.uint8)
        pixels[:, :16], pixels[:, 16:] = 120 - 9 * i, 135 + 9 * i
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return [
        "model=custom", f"model.target={tmp_path}/net.py:Net", "model.input_size=32", "layers=all",
        "layers.include=[act]", "data=folder", f"data.root={tmp_path}/images", f"run.root={tmp_path}", "run.name=r",
        "render.steps=16", "render.size=32", "render.margin=4", "render.canvas.sd=0.001", "engine=inline",
        "examples.k=3", "examples.batch=4",
    ]  # fmt: skip


def outcomes(folder: Path) -> pd.DataFrame:
    with pipeline.open_atlas(folder) as atlas:
        table = atlas.units()
    return table.set_index(["preset", "channel", "variant"]).sort_index()


def test_a_preset_that_starts_from_examples_fails_only_for_units_without_one(
    overrides: list[str], tmp_path: Path
) -> None:
    """One such unit used to end the whole run."""
    assert main(["run", *overrides, "render=image_prior"]) == 0
    table = outcomes(tmp_path / "r").loc["image_prior"]
    assert table.loc[(2, 0)].status == "failed" and table.loc[(2, 0)].reason == NO_EXAMPLE
    assert (table.loc[[(0, 0), (1, 0)]].reason != NO_EXAMPLE).all()
    assert main(["verify", str(tmp_path / "r"), "run.trust=true"]) == 0


def test_a_silent_unit_starts_from_its_best_example_and_a_dead_one_says_both(
    overrides: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "r"
    assert main(["run", *overrides]) == 0
    table = outcomes(folder).loc["distill"]
    heard, silent, dead = (table.loc[(channel, 0)] for channel in range(3))
    assert heard.status in ("converged", "limit") and heard.reason == ""
    assert silent.status == "restarted" and silent.activation > silent.start > 0, silent.reason
    assert silent.reason == "started from its best dataset example after 3 silent attempts"
    assert dead.status == "failed" and dead.activation == 0
    assert dead.reason == (
        "no gradient: the unit stayed silent at every step; it has no dataset example to start from, as no dataset "
        "image activates it"
    )
    failures = (folder / "failures.csv").read_text()
    assert "act:2 distill variant 0" in failures and "no dataset example" in failures and "act:1" not in failures
    with pipeline.open_atlas(folder) as atlas:
        image = atlas["act"].image(1).astype(float).mean(-1)
        assert atlas["act"].mask(1).any() and not atlas["act"].mask(2).any()
    # All examples have their edge in the middle.
    assert image[:, 18:24].mean() - image[:, 8:14].mean() > 60


@pytest.mark.long
def test_a_second_run_and_one_after_compaction_make_nothing_again(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "r"
    assert main(["run", *overrides]) == 0
    table = outcomes(folder).loc["distill"]
    capsys.readouterr()
    before = (folder / "atlas.h5").read_bytes()
    assert main(["run", *overrides]) == 0
    told = capsys.readouterr().err
    assert "Nothing is missing" in told and "once more" not in told
    assert (folder / "atlas.h5").read_bytes() == before
    assert main(["verify", str(folder), "run.check=3", "run.trust=true"]) == 0

    # After compaction nothing is made again, and no shard is left of the attempts that were replaced.
    assert main(["compact", str(folder)]) == 0
    assert not list((folder / "shards" / "render").rglob("*.h5"))
    assert main(["run", *overrides]) == 0
    pd.testing.assert_frame_equal(outcomes(folder).loc["distill"], table)
    assert main(["verify", str(folder), "run.check=3", "run.trust=true"]) == 0


@pytest.mark.long
def test_an_interrupted_restart_goes_on(overrides: list[str], tmp_path: Path) -> None:
    """Shards of the first attempts alone, as a run leaves them that ends before the restart, or of a former version."""
    folder = tmp_path / "r"
    assert main(["run", *overrides]) == 0
    expected = outcomes(folder)
    restarts = [p for p in (folder / "shards" / "render").rglob("*.h5") if "restart" in shards.read(p).attributes]  # type: ignore[union-attr]
    assert len(restarts) == 2
    for path in restarts:
        path.unlink()
    assert main(["render", *overrides]) == 0
    again = outcomes(folder)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), expected.drop(columns="seconds"))


@pytest.mark.long
def test_other_dataset_images_are_another_start(overrides: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "r"
    assert main(["run", *overrides]) == 0
    before = outcomes(folder).loc[("distill", 1, 0)]
    assert main(["compact", str(folder)]) == 0
    # Without the images that reach the threshold, the unit has no example any more.
    assert main(["run", *overrides, "data.limit=3", "run.update=true"]) == 0
    after = outcomes(folder).loc[("distill", 1, 0)]
    assert before.status == "restarted" and after.status == "failed"
    assert "no dataset example" in after.reason
    assert main(["run", *overrides, "run.update=true"]) == 0
    again = outcomes(folder).loc[("distill", 1, 0)]
    assert again.status == "restarted" and again.activation == pytest.approx(before.activation, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("off", ["examples.store=ids", "render=negative", "render"])
def test_without_examples_units_stay_as_they_were(overrides: list[str], tmp_path: Path, off: str) -> None:
    if off == "render":
        assert main(["render", *overrides]) == 0
        preset = "distill"
    else:
        assert main(["run", *overrides, off]) == 0
        preset = "negative" if "negative" in off else "distill"
    for channel in (1, 2):
        unit = outcomes(tmp_path / "r").loc[(preset, channel, 0)]
        assert unit.status == "failed" and unit.reason == "no gradient: the unit stayed silent at every step"


def test_variants_that_were_not_silent_stay() -> None:
    """A unit whose variants differ: what noise reached is kept."""
    before = {
        "channels": np.array([4, 5], np.int32),
        "status": np.array([["limit", "failed"], ["failed", "failed"]], object),
        "reason": np.array([["", SILENT], [SILENT, "the objective did not rise over the start"]], object),
        "activation": np.array([[1.0, 0.0], [0.0, 0.5]], np.float32),
        "images_sha256": np.zeros((2, 2, 32), np.uint8),
    }
    after = {
        "channels": before["channels"],
        "status": np.array([["restarted", "restarted"], ["failed", "restarted"]], object),
        "reason": np.array([["r", "r"], [SILENT + "; in vain", "r"]], object),
        "activation": np.array([[7.0, 8.0], [9.0, 10.0]], np.float32),
    }
    merged = _restarted_arrays(before, after)
    assert merged["status"].tolist() == [["limit", "restarted"], ["failed", "failed"]]
    assert merged["activation"].tolist() == [[1.0, 8.0], [0.0, 0.5]]
    assert merged["reason"].tolist() == [["", "r"], [SILENT + "; in vain", before["reason"][1, 1]]]
    assert merged.keys() == {"channels", "status", "reason", "activation"}
