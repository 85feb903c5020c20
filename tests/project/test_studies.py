"""Studies: each composes and has a page; their formulas where the answer is known; and one of them, whole."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import compose
from PIL import Image

from pipeline.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "studies"))

import diversity  # noqa: E402
import examples  # noqa: E402
import mosaic  # noqa: E402
import page  # noqa: E402
import prior  # noqa: E402

NAMES = sorted(path.stem for path in (ROOT / "conf" / "experiment" / "study").glob("*.yaml"))


def test_there_are_seven() -> None:
    assert len(NAMES) == 7


@pytest.mark.parametrize("name", NAMES)
def test_every_study_has_settings_a_command_and_a_page(name: str) -> None:
    config = compose([f"experiment=study/{name}"]).config
    assert config.run.name == f"study-{name}"
    assert (ROOT / "scripts" / "studies" / f"{name}.py").is_file()
    written = (ROOT / "docs" / "studies" / f"{name}.md").read_text()
    assert f"scripts/study {name}" in written and page.NUMBERS.search(written)


def test_facets_count_what_differs() -> None:
    """Four answers: all alike, two and two, all unlike; about a mean that other units hold at zero."""
    basis = np.eye(8)
    alike, two, unlike = (basis[list(rows)] for rows in ((0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 2, 3)))
    units = np.stack([alike, two, unlike])
    found = diversity.facets(np.concatenate([units, -units]))  # the mean answer is 0
    assert found == pytest.approx([1, 2, 4, 1, 2, 4], abs=1e-6)


def test_variance_goes_where_it_comes_from() -> None:
    rng = np.random.default_rng(3)
    units, starts, both = rng.normal(size=(40, 1, 30)), rng.normal(size=(1, 40, 30)), rng.normal(size=(40, 40, 30))
    assert prior.components(units + 0 * starts) == pytest.approx((1, 0, 0), abs=1e-9)
    assert prior.components(0 * units + starts) == pytest.approx((0, 1, 0), abs=1e-9)
    assert prior.components(both) == pytest.approx((0, 0, 1), abs=0.01)
    # Standard deviations 1, 2 and 1: a sixth, two thirds, a sixth.
    assert prior.components(units + 2 * starts + both) == pytest.approx((1 / 6, 2 / 3, 1 / 6), abs=0.05)
    # A standard error is that of a share when other units are drawn: of 200 draws of 8 units, within half of it.
    drawn = [rng.normal(size=(8, 1, 3)) + rng.normal(size=(1, 6, 3)) + rng.normal(size=(8, 6, 3)) for _ in range(200)]
    shares = np.array([prior.components(values) for values in drawn])
    told = np.array([prior.errors(values) for values in drawn]).mean(0)
    assert told[0] == pytest.approx(shares.std(0)[0], rel=0.5)


def test_cosines_are_about_the_usual_answer() -> None:
    usual = np.array([5.0, 5.0, 5.0])
    pictures, best = usual + np.eye(3)[:2], usual + np.array([[2.0, 0, 0], [0, 0, 3.0]])
    assert examples.cosines(pictures, best, usual) == pytest.approx(np.array([[1, 0], [0, 0]]), abs=1e-12)


def test_a_page_keeps_its_words_and_gets_new_numbers(tmp_path: Path) -> None:
    where = tmp_path / "one.md"
    where.write_text("# One\n\n<!-- numbers -->\nold | table\n<!-- end -->\n\nWords.\n")
    table = pd.DataFrame({"a": [1], "b": ["0.5 [0.4, 0.6]"]})
    for _ in range(2):
        page.publish(page.Report({"Above it:": table}, Image.new("RGB", (8, 8))), where)
        written = where.read_text()
        assert "old" not in written and "| 1 | 0.5 [0.4, 0.6] |" in written and written.count("Above it:") == 1
        assert written.startswith("# One\n") and written.endswith("\nWords.\n")
    assert (tmp_path / "one.jpg").is_file()
    where.write_text("# One\n")
    with pytest.raises(SystemExit, match="no place for numbers"):
        page.publish(page.Report({}, Image.new("RGB", (8, 8))), where)


@pytest.mark.long
def test_a_study_has_tables_and_a_figure(tiny_run: list[str], tmp_path: Path) -> None:
    """Two presets of four pictures on a small network: what `scripts/study` calls once the run is there."""
    settings = ["render.name=naive", "render.variants=3", "also=[distill]", "also.distill.variants=3"]
    settings += [f"also.distill.{key}" for key in ("steps=2", "size=32", "margin=4")]
    overrides = [o for o in tiny_run if not o.startswith("run.")]
    assert main(["run", *overrides, *settings, f"run.root={tmp_path}", "run.name=study"]) == 0
    found = mosaic.report(tmp_path / "study")
    first, second = found.tables.values()
    assert list(first["preset"]) == ["`naive`", "`distill`"] and list(second["preset"]) == ["`distill`"]
    assert "activation ratio (peak)" in first and " : " in second["high frequencies"][0]
    assert found.figure.width > 2 * page.SIDE
    facets = next(iter(diversity.report(tmp_path / "study").tables.values()))
    assert 1 <= float(facets["facets"][0].split()[0]) <= 3
