"""Comparisons without a browser: medians, intervals, wins, alignment, refusals, the table and the files of the site."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from test_site import LAYERS, SMALL, check_links, shard, write_atlas

from pipeline.cli.main import main
from pipeline.cli.overrides import split_compare, split_options, to_overrides
from pipeline.compare import Comparison, align, open_runs
from pipeline.compare.build import build
from pipeline.compare.console import print_comparison
from pipeline.compare.image_distance import FEATURES, difference, features
from pipeline.compare.plots import axis, scatter
from pipeline.compare.runs import differing_settings
from pipeline.compare.statistics import median, paired_test, sign_test
from pipeline.core.errors import AtlasError
from pipeline.core.metric_specs import in_comparison_order, metric_named
from pipeline.site.config import SiteConfig
from pipeline.site.output import MARK
from pipeline.store.hdf5 import write_array
from pipeline.store.shards import safe_name

# ----------------------------------------------------------------- inference


def test_a_median_and_its_interval() -> None:
    found = median(np.array([3.0, 1.0, np.nan, 2.0, np.inf]))
    assert (found.units, found.value) == (3, 2.0) and 1 <= found.low <= 2 <= found.high <= 3
    assert median(np.array([5.0])) == median(np.array([5.0, np.nan]))
    none = median(np.array([np.nan]))
    assert none.units == 0 and math.isnan(none.value) and math.isnan(none.low)


@pytest.mark.parametrize("n", [2, 5, 6, 31])
def test_middles_are_those_of_real_resamples(n: int) -> None:
    """The shortcut by order statistics has the distribution of resampling with replacement."""
    values = np.sort(np.random.default_rng(n).normal(0, 1, n))
    plain = np.median(np.random.default_rng(1).choice(values, (200_000, n)), 1)
    # 1 in 4 and the middle: far enough inside for 60,000 draws to agree with 200,000.
    quick = [median(values, draws=60_000, level=level) for level in (0.5, 0.05)]
    for found, level in zip(quick, (0.5, 0.05), strict=True):
        around = [
            np.quantile(plain, (1 + s * level) / 2 + d) for s, d in ((-1, -0.012), (-1, 0.012), (1, -0.012), (1, 0.012))
        ]
        assert around[0] <= found.low <= around[1] and around[2] <= found.high <= around[3]


@pytest.mark.parametrize("n", [20, 41])
def test_intervals_hold_the_true_median_as_often_as_they_say(n: int) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        found = median(rng.exponential(1, n))
        held += found.low <= math.log(2) <= found.high
    assert 0.91 <= held / 400 <= 0.99


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.integers(0, 5))
def test_an_interval_lies_among_the_values(values: list[float], seed: int) -> None:
    found = median(np.array(values), seed)
    assert min(values) <= found.low <= found.high <= max(values)
    assert found == median(np.array(values[::-1]), seed)


def test_the_sign_test_against_counting_by_hand() -> None:
    assert sign_test(5, 0) == pytest.approx(2 / 32)
    assert sign_test(1, 3) == sign_test(3, 1) == pytest.approx(2 * (1 + 4) / 16)
    assert sign_test(4, 4) == 1.0
    assert math.isnan(sign_test(0, 0))
    assert 0 < sign_test(9000, 11000) < 1e-40  # no overflow


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_the_sign_test_equals_exact_binomial_sums(wins: int, losses: int) -> None:
    n = max(wins + losses, 1)
    tail = Fraction(2 * sum(math.comb(n, k) for k in range(min(wins, losses) + 1)), 2**n)
    if wins + losses:
        assert sign_test(wins, losses) == pytest.approx(min(1.0, float(tail)), rel=1e-11, abs=0)


def test_pairs_are_counted_where_both_are() -> None:
    one = np.array([2.0, 5.0, 1.0, 4.0, np.nan, 7.0])
    other = np.array([1.0, 3.0, 2.0, 4.0, 1.0, np.nan])
    found = paired_test(one, other)
    assert (found.wins, found.losses, found.ties, found.difference.units) == (2, 1, 1, 4)
    assert found.difference.value == 0.5 and found.p == 1.0
    less = paired_test(one, other, better=-1)
    assert (less.wins, less.losses) == (1, 2) and less.difference == found.difference


def test_a_paired_interval_is_narrower_than_units_are_apart() -> None:
    base = np.random.default_rng(0).uniform(0, 100, 60)
    found = paired_test(base + 1 + np.random.default_rng(1).normal(0, 0.1, 60), base)
    assert 0.9 < found.difference.low < found.difference.high < 1.1 and found.wins == 60


# --------------------------------------------------------------- pictures, axes


def picture(kind: str) -> Image.Image:
    ramp = np.indices((64, 64)).sum(0)
    pixels = {"coarse": ramp // 32 % 2 * 255, "fine": ramp % 2 * 255, "flat": np.full((64, 64), 99)}[kind]
    return Image.fromarray(np.repeat(pixels[..., None], 3, 2).astype(np.uint8))


def test_pictures_differ_by_colour_and_scale_but_not_by_place() -> None:
    coarse, fine, flat = (features(picture(kind)) for kind in ("coarse", "fine", "flat"))
    assert len(coarse) == FEATURES and coarse[:64].sum() == pytest.approx(1) and coarse[64:].sum() == pytest.approx(1)
    moved = features(Image.fromarray(np.roll(np.asarray(picture("coarse")), 9, 1)))

    def apart(*each: np.ndarray) -> float:
        return float(difference(np.stack(each)[:, None])[0])

    assert apart(coarse, moved) == pytest.approx(0, abs=1e-9)
    # The same black and white, at other scales: the one half of it.
    assert apart(coarse, fine) == pytest.approx(0.5, abs=0.02)
    assert apart(coarse, flat) > 0.7
    nothing = np.full(FEATURES, np.nan)
    assert apart(coarse, nothing, fine) == apart(coarse, fine) and math.isnan(apart(coarse, nothing))


def test_axes_hold_all_values_and_round_ticks() -> None:
    plain, wide = axis(np.array([0.0, 3.0, 10.0]), 0, 100), axis(np.array([0.1, 1000.0]), 100, 0)
    assert not plain.log and wide.log and 0 <= plain.at(0) < plain.at(10) <= 100
    assert [text for _, text in plain.ticks] == ["0", "2", "4", "6", "8", "10"]
    assert [text for _, text in wide.ticks] == ["0.1", "1", "10", "100", "1000"]
    assert wide.at(1000) < wide.at(0.1) and axis(np.array([2.0, 2.0]), 0, 1).ticks
    assert axis(np.array([-5.0, -1.0]), 0, 1).ticks[0][1] == "−5"


def test_measures_nobody_described_are_shown_too() -> None:
    names = [
        m.name for m in in_comparison_order(["seconds", "newly_thought_of", "peak_ratio", "activation", "checkerboard"])
    ]
    assert names == ["peak_ratio", "checkerboard", "newly_thought_of", "activation", "seconds"]
    assert (metric_named("newly_thought_of").title, metric_named("newly_thought_of").better) == (
        "newly thought of",
        "neither",
    )


# ---------------------------------------------------------------------- atlases


def change(path: Path, layer: str, preset: str, **arrays: Sequence[float]) -> None:
    """Other numbers of the pictures of a layer; new names are added."""
    with h5py.File(path, "r+") as file:
        group = file[f"layers/{safe_name(layer)}/render/{preset}"]
        assert isinstance(group, h5py.Group)
        for name, values in arrays.items():
            if name in group:
                del group[name]
            write_array(group, name, np.asarray(values, np.float32).reshape(-1, 1))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of one network: `one`, `two` with other pictures of stem, `few` without a layer and some channels."""
    root = tmp_path_factory.mktemp("runs")
    few = [
        (*layer[:3], layer[3][: 4 if layer[0] == "stem" else 2], *layer[4:]) for layer in LAYERS if layer[0] != "head"
    ]
    for name, layers, seed in (("one", LAYERS, 0), ("two", LAYERS, 90), ("few", few, 7)):
        (root / name).mkdir()
        write_atlas(root / name / "atlas.h5", layers=layers, seed=seed)
        (root / name / "config.yaml").write_text("model: tiny\n")
    change(
        root / "one" / "atlas.h5",
        "stem",
        "distill",
        activation=[1, 2, 3, 4, 5, 6],
        checkerboard=[3] * 6,
        newly_found=range(6),
    )
    change(
        root / "two" / "atlas.h5",
        "stem",
        "distill",
        activation=[2, 2, 1, 9, 6, 7],
        checkerboard=[1, 2, 3, 4, 1, 1],
        newly_found=range(6),
    )
    return root


def compare(root: Path, *runs: str, presets: Sequence[str] = ("distill",)) -> Comparison:
    with open_runs(runs, presets, root) as inputs:
        return align(inputs)


def test_numbers_stand_beside_each_other(root: Path) -> None:
    found = compare(root, "one", "two")
    assert [c.label for c in found.contenders] == ["one", "two"]
    stem = found.layers[0]
    assert stem.of("activation").tolist() == [[1, 2, 3, 4, 5, 6], [2, 2, 1, 9, 6, 7]]
    natural = stem.dataset_max[0]
    assert np.array_equal(natural, stem.dataset_max[1]) and natural[3] < 0
    expected = np.where(natural > 0, stem.of("activation")[1] / natural, np.nan)
    assert np.allclose(stem.of("mean_ratio")[1], expected, equal_nan=True)
    activation = next(m for m in found.measures if m.name == "activation")
    assert found.disagreement(stem, activation).tolist() == [1, 0, 2, 5, 1, 1]
    ratio = next(m for m in found.measures if m.name == "mean_ratio")
    assert np.isnan(found.disagreement(stem, ratio)).tolist() == [False] * 3 + [True] + [False] * 2
    names = [m.name for m in found.measures]
    assert names[:3] == ["peak_ratio", "mean_ratio", "robust_share"] and names[-5:] == [
        "activation",
        "robust",
        "start",
        "steps",
        "seconds",
    ]
    assert names.index("checkerboard") < names.index("newly_found") < names.index("activation")
    assert found.main.name == "peak_ratio" and found.all_units.of("peak_ratio").shape == (
        2,
        sum(len(layer[3]) for layer in LAYERS),
    )


def test_the_summary_counts_wins(root: Path) -> None:
    table = compare(root, "one", "two").summary().set_index(["layer", "measure", "contender", "against"])
    row = table.loc[("stem", "activation", "two", "one")]
    assert (row.wins, row.losses, row.ties, row.units, row.left_out) == (4, 1, 1, 6, 0)
    assert row["median"] == 1.0 and row.p == pytest.approx(2 * (1 + 5) / 32)
    # Less of a checkerboard is better.
    row = table.loc[("stem", "checkerboard", "two", "one")]
    assert (row.wins, row.losses, row.ties, row.better) == (4, 1, 1, "lower")
    # Only stem has this one, and nobody knows what it is.
    row = table.loc[("*", "newly_found", "two", "one")]
    assert (row.units, row.ties, row.better) == (6, 6, "neither") and math.isnan(row.p)
    assert table.loc[("head", "newly_found", "one", "")].units == 0
    gain = table.loc[("stem", "mean_ratio", "two", "one")]
    assert gain.units == 5 and gain.left_out == 1  # the one that no photograph drives above zero
    assert table.loc[("stem", "activation", "one", "")]["median"] == 3.5


def test_units_that_one_lacks_are_left_out_of_pairs(root: Path) -> None:
    found = compare(root, "one", "few")
    even = next(part for part in found.layers if part.name == "blocks.0.conv")
    assert even.channels.tolist() == list(LAYERS[1][3]) and even.rendered[1].tolist() == [True, True] + [False] * 18
    table = found.summary().set_index(["layer", "measure", "contender", "against"])
    row = table.loc[("blocks.0.conv", "activation", "few", "one")]
    assert (row.units, row.left_out) == (2, 18)
    assert table.loc[("head", "activation", "few", "one")].units == 0
    units = found.units()
    assert len(units) == 2 * len(found.all_units.channels)
    lacking = units[(units.layer == "head") & (units.contender == "few")]
    assert not lacking.picture.any() and lacking.activation.isna().all()
    assert units[(units.layer == "blocks.0.conv") & (units.contender == "one")].failed.sum() == 1


def test_presets_of_one_run_against_each_other(root: Path) -> None:
    found = compare(root, "one", presets=("neuron", "distill"))
    assert [c.label for c in found.contenders] == ["neuron", "distill"]
    grey = next(part for part in found.layers if part.name == "blocks.1.conv")
    assert np.isfinite(grey.of("peak_ratio")).any(1).all()
    # An activation means the same only beside the same objective.
    activation = next(m for m in found.measures if m.name == "activation")
    assert found.paired_test(grey, activation, 1, 0) is None
    assert found.paired_test(grey, found.main, 1, 0) is not None
    both = compare(root, "one", "two", presets=())
    assert [c.label for c in both.contenders] == ["one/distill", "one/neuron", "two/distill", "two/neuron"]


def test_several_pictures_of_a_unit_count_as_their_median(root: Path, tmp_path: Path) -> None:
    path = write_atlas(tmp_path / "atlas.h5")
    with h5py.File(path, "r+") as file:
        group = file["layers/blocks.1.conv/render/neuron"]
        assert isinstance(group, h5py.Group)
        group["activation"][...] = np.array([[1, 3], [5, 9], [7, np.nan]], np.float32)  # type: ignore[index]
        status = np.full((3, 2), "converged", object)
        status[0, 0] = "missing"
        group["status"][...] = status  # type: ignore[index]
    found = compare(root, str(path), presets=("neuron", "distill"))
    grey = next(part for part in found.layers if part.name == "blocks.1.conv")
    assert grey.of("activation")[0].tolist() == [3, 7, 7]


def test_a_negative_is_better_the_lower_it_reaches(root: Path, tmp_path: Path) -> None:
    for name, reached in (("low", -3), ("lower", -6)):
        path = write_atlas(tmp_path / f"{name}.h5")
        change(path, "stem", "distill", activation=[reached] * 6)
        with h5py.File(path, "r+") as file:
            file["layers/stem/render/distill"].attrs["natural"] = "least"
            write_array(file["layers/stem/stats"], "least_mean", np.full(6, -2, np.float32))  # type: ignore[arg-type]
    found = compare(tmp_path, str(tmp_path / "low.h5"), str(tmp_path / "lower.h5"))
    row = found.summary().set_index(["layer", "measure", "contender", "against"])
    assert found.layers[0].of("mean_ratio").tolist() == [[1.5] * 6, [3.0] * 6]
    for measure, better in (("mean_ratio", "higher"), ("activation", "lower")):
        pair = row.loc[("stem", measure, "lower.h5", "low.h5")]
        assert (pair.wins, pair.better) == (6, better)


def test_a_run_without_photographs_borrows_what_they_reached(root: Path, tmp_path: Path) -> None:
    path = write_atlas(tmp_path / "atlas.h5", examples=False)
    found = compare(root, "one", str(path))
    assert np.array_equal(found.layers[0].dataset_max[1], found.layers[0].dataset_max[0])
    assert np.isfinite(found.layers[0].of("mean_ratio")[1]).sum() == 5


# ---------------------------------------------------------------------- effects


def add_effects(path: Path, mean: Sequence[float], raised: Sequence[float], ablated: Sequence[int] = (1, 3)) -> None:
    """Mean effects of the six units of stem over two images, and of some by ablation on the first outputs."""
    with h5py.File(path, "r+") as file:
        group, columns = "layers/stem/effects", np.array(mean, np.float32)
        write_array(file, "effects/index", np.arange(2, dtype=np.int32))
        write_array(file, f"{group}/attribution", np.stack([columns + 1, columns - 1], 1))
        write_array(file, f"{group}/mean", columns)
        write_array(file, f"{group}/size", np.abs(columns) + 1)
        write_array(file, f"{group}/ablation/channel", np.array(ablated, np.int32))
        effects = np.zeros((len(ablated), 5), np.float32)
        effects[:, : len(raised)] = raised
        for replacement in ("zero", "mean"):
            for name, array in (("top", np.zeros((len(ablated), 2), np.float32)), ("mean", effects), ("sd", effects)):
                write_array(file, f"{group}/ablation/{replacement}/{name}", array)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Runs `less` and `more` with different effects, `same` with those of `less`, and `none` without."""
    for name in ("less", "more", "same", "none"):
        write_atlas(tmp_path / f"{name}.h5")
    for name in ("less", "same"):
        add_effects(tmp_path / f"{name}.h5", [1, 2, 3, 4, 5, np.nan], [0.5, 0.1])
    add_effects(tmp_path / "more.h5", [2, 3, 5, 4, 6, 7], [0.25, 0.2, 0.0], ablated=(0, 3))
    return tmp_path


def test_effects_of_other_images_are_compared(measured: Path, capsys: pytest.CaptureFixture) -> None:
    found = compare(measured, *(str(measured / f"{name}.h5") for name in ("less", "none", "more")))
    (change,) = found.effects
    assert (change.layer, change.contender, change.against) == ("stem", "more.h5", "less.h5")
    assert change.units == 5 and change.change.value == 1 and change.size_change.value == 1
    # The ranks 1 2 3 4 5 became 1 2 4 3 5.
    assert change.rank_correlation == pytest.approx(0.9)
    # Unit 3 is ablated in both.
    assert change.ablated == 1 and [round(moved, 3) for _, moved in change.outputs] == [0.25, 0.1]
    units = found.units().set_index(["layer", "contender"])
    assert units.loc[("stem", "more.h5"), "effect"].tolist() == [2, 3, 5, 4, 6, 7]
    assert units.loc[("stem", "none.h5"), "effect_size"].isna().all()
    row = found.summary().set_index(["layer", "measure", "contender", "against"])
    assert row.loc[("stem", "effect", "more.h5", "less.h5")]["median"] == 1
    print_comparison(found, Console(width=200, file=sys.stdout))
    assert "more.h5 − less.h5" in capsys.readouterr().out


def test_the_site_shows_changes_of_effects_where_there_are_any(measured: Path) -> None:
    for names, shown in ((("less", "more"), True), (("less", "same"), False), (("less", "none"), False)):
        with open_runs([str(measured / f"{name}.h5") for name in names], ["distill"]) as inputs:
            made = build(inputs, measured / "site", SMALL)
        table = measured / "site" / "effects.csv"
        page = (measured / "site" / "index.html").read_text()
        assert bool(made.comparison.effects) == shown == table.is_file() == ("Effects on the outputs" in page)
        assert ("effect" in made.comparison.units().columns) == shown
        check_links(measured / "site")
        if shown:
            row = pd.read_csv(table).iloc[0]
            assert row.units == 5 and row.effect_change == 1 and row.output_1_change == pytest.approx(0.25)


# --------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("key", "word"), [("model", "model"), ("weights_sha256", "weights"), ("dataset_fingerprint", "dataset")]
)
def test_what_is_not_the_same_network_and_photographs_is_refused(
    root: Path, tmp_path: Path, key: str, word: str
) -> None:
    path = write_atlas(tmp_path / "atlas.h5")
    with h5py.File(path, "r+") as file:
        file.attrs[key] = "0ther"
    with pytest.raises(AtlasError, match=rf"{word} \({key}\): \w+ and 0ther") as error:
        compare(root, "one", str(path))
    assert str(error.value).count(" and ") == 2  # nothing else is named


@pytest.mark.parametrize(
    ("runs", "presets", "says"),
    [
        (("one",), ("distill",), "two runs"),
        (("one", "one"), ("distill",), "two runs"),
        ((), (), "nothing"),
        (("one", "twos"), (), "no run 'twos' in .* Nearest: two"),
        (("one", "two"), ("distil",), "Nearest: distill"),
        (("one", "begun"), (), "without an atlas.h5"),
    ],
)
def test_bad_input_says_how_to_mend_it(root: Path, runs, presets, says: str) -> None:
    (root / "begun").mkdir(exist_ok=True)
    (root / "begun" / "config.yaml").write_text("")
    with pytest.raises(AtlasError, match=says):
        compare(root, *runs, presets=presets)


def test_runs_are_found_by_name_folder_and_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    for runs in (("one", "two"), ("./one", str(root / "two")), ("one/atlas.h5", "two")):
        assert [c.run for c in compare(root, *runs).contenders] == ["one", "two"]


def test_settings_that_differ_are_told(root: Path) -> None:
    with open_runs(["one", "two"], ["distill"], root) as inputs:
        one, two = inputs.contenders
    assert differing_settings([one, two]) == [] and one.settings["canvas.decay"] == "1.25"
    changed = {**one.settings, "canvas.decay": "2.0", "extra": "x"}
    other = type(one)("b", "b", "distill", one.path, "", "mean", "", changed)
    assert differing_settings([one, other]) == [("canvas.decay", ["1.25", "2.0"]), ("extra", ["", "x"])]


def test_arguments() -> None:
    asked, rest = split_compare(["runs=[a, 'b c']", "d", "presets=tv,naive", "out=x", "run.root=r", "--cfg", "job"][:5])
    assert (asked.runs, asked.presets, asked.out, rest) == (("a", "b c", "d"), ("tv", "naive"), "x", ["run.root=r"])
    _, rest = split_options("compare", ["runs=[a,b]", "out=x", "site.format=avif"])
    assert to_overrides(rest) == ["site.format=avif"]


# ------------------------------------------------------------------------- site


@pytest.fixture(scope="module")
def site(root: Path) -> Path:
    with open_runs(["one", "two", "few"], ["distill"], root) as inputs:
        build(inputs, root / "site", SMALL)
    return root / "site"


def test_every_link_leads_somewhere_and_nothing_is_foreign(site: Path) -> None:
    assert check_links(site) > 50
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert "<script>alert" not in text and "onerror" not in re.sub(r"&[^;]+;", "", text)
        assert not re.search(r"(?:src|href)=\"(?:https?:)?//", text) and " style=" not in text
        assert "default-src &#39;none&#39;; script-src &#39;self&#39;" in text


def test_shards_hold_the_numbers_and_the_places_of_pictures(site: Path, root: Path) -> None:
    index = shard(site, "index")
    assert [c["label"] for c in index["contenders"]] == ["one", "two", "few"] and index["main"] == "peak_ratio"
    assert [layer[0] for layer in index["layers"]] == [layer[0] for layer in LAYERS]
    found = compare(root, "one", "two", "few")
    values = shard(site, "measures/activation")
    assert values[0][0] == [1, 2, 3, 4, 5, 6] and values[0][2][4:] == [None] * 2
    row = 5
    unit = shard(site, f"stem/u{row - row % index['sizes']['shard']}")["units"][row % index["sizes"]["shard"]]
    assert unit["channel"] == 5 and unit["values"]["activation"] == [6, 7, None]
    # A receptive field of 3 pixels shows no object, and a label names no unit of the stem.
    assert "label" not in unit and any(one.get("label") for one in shard(site, "blocks.0.conv/u0")["units"])
    assert [p and p[0]["status"] for p in unit["pictures"]] == ["converged", "converged", None]
    assert np.float32(unit["values"]["mean_ratio"][1]) == np.float32(found.layers[0].of("mean_ratio")[1][5])
    # The pictures of stem are plain colours: those of the sheets are those of the atlas.
    sheets = shard(site, "stem/layer")["sheets"]
    for at, run in enumerate(("one", "two")):
        per, variants, columns, width, height = sheets[at]
        assert variants == 1 and per >= 6
        sheet = np.asarray(Image.open(site / f"media/stem/p{at}-0.webp").convert("RGB")).astype(int)
        with open_runs([run, "few"], ["distill"], root) as inputs:
            image = inputs.first["stem"].image(4, "distill").astype(int)
        y, x = (4 // columns) * height + height // 2, (4 % columns) * width + width // 2
        assert np.abs(sheet[y, x] - image[5, 5]).max() < 25
    missing = np.asarray(Image.open(site / "media/stem/p2-0.webp").convert("RGB")).astype(int)
    assert np.ptp(missing[-3, -3]) < 8  # the grey of a cell that holds nothing


def test_tables_beside_the_site(site: Path, root: Path) -> None:
    units, summary = pd.read_parquet(site / "compare.parquet"), pd.read_csv(site / "summary.csv")
    again = pd.read_csv(site / "compare.csv")
    assert list(units.columns) == list(again.columns) and len(units) == len(again) == 3 * sum(len(x[3]) for x in LAYERS)
    stem = units[(units.layer == "stem") & (units.contender == "one")]
    other = units[(units.layer == "stem") & (units.contender == "two")]
    assert (stem.difference > 0.2).all() and stem.difference.tolist() == other.difference.tolist()
    late = units[(units.layer == "blocks.0.conv") & units.picture & (units.channel > 2)]
    assert len(late) == 36 and (late.difference < 0.05).all()  # the same colours in the two that have them
    assert len(summary) == 6 * summary.measure.nunique() * (3 + 3)


def test_the_same_atlases_give_the_same_bytes(site: Path, root: Path) -> None:
    with open_runs(["one", "two", "few"], ["distill"], root) as inputs:
        build(inputs, root / "again", SMALL)
    first, second = (
        {p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file()} for d in (site, root / "again")
    )
    assert first == second


def test_a_site_of_many_units_fits(tmp_path: Path) -> None:
    """700 units of a layer: several pieces, few files."""
    layers = [("wide", "conv", 700, tuple(range(700)), 8, 20, 32, 3)]
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        write_atlas(tmp_path / name / "atlas.h5", layers=layers, seed=seed, examples=False)
    tight = SiteConfig(thumb_px=32, picture_px=32, max_files=150)
    with open_runs(["a", "b"], ["distill"], tmp_path) as inputs:
        made = build(inputs, tmp_path / "out", tight)
    assert made.host.files <= 150 and made.comparison.main.name == "activation"
    assert shard(tmp_path / "out", "index")["layers"][0][3] == [[0, 699]]
    plot = scatter(made.comparison, made.comparison.layers, 0, 1, lambda layer, channel: f"{layer}:{channel}")
    assert plot is not None and plot.units == 700 and len(plot.links) == 300 and plot.dots.count("M") > 100
    assert plot.links[-1][2].startswith("wide:")


@pytest.mark.long
def test_the_command(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", "runs=[one,two]", "presets=[distill]", f"run.root={root}"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "two against one" in out and "activation ratio (peak) ↑" in out and "blocks.0.conv" in out
    assert (root / "compare-one-two" / "index.html").is_file()
    assert main([*arguments, f"out={tmp_path}/mine", "few"]) == 0
    assert "few: " in capsys.readouterr().out and (tmp_path / "mine" / MARK).is_file()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("dear")
    assert main([*arguments, "out=taken"]) == 2
    assert main(["compare", "runs=[one]", "presets=[distill]", f"run.root={root}"]) == 2
    assert "needs two runs" in capsys.readouterr().err
    index = json.loads((tmp_path / "mine/data/index.js").read_text().removeprefix('ATLAS.put("index",')[:-3])
    assert len(index["contenders"]) == 3


# ------------------------------------------------------------- dataset examples


def test_dataset_examples_stand_beside_the_pictures(site: Path, root: Path) -> None:
    """The examples of the store, once for runs that have the same ones, as crops in sheets."""
    with open_runs(["one"], ["distill", "neuron"], root) as inputs:
        layer = inputs.first["blocks.0.conv"]
        best, paths = layer.examples("max"), inputs.first.dataset()
    assert best is not None
    facts = shard(site, "blocks.0.conv/layer")
    group, other = facts["examples"]
    assert (group["runs"], other["runs"]) == (["one", "two"], ["few"])
    per, each, columns, px = group["sheet"]
    assert each == SMALL.examples
    unit = shard(site, "blocks.0.conv/u0")["units"][3]
    shown = unit["examples"][0]
    row = layer.row(unit["channel"])
    indices = [i for i in best.index[row, :each].tolist() if i >= 0]
    assert [np.float32(value) for value, _ in shown] == best.value[row, : len(indices)].tolist()
    assert [name for _, name in shown] == [paths["label"][i] or paths["path"][i] for i in indices]
    with Image.open(site / "media/blocks.0.conv/x0-0.jpg") as image:
        assert image.size == (columns * px, math.ceil(min(per, len(layer.channels)) * each / columns) * px)
        cell = 3 * each
        left, top = cell % columns * px, cell // columns * px
        assert np.asarray(image)[top : top + px, left : left + px].std() > 5


@pytest.mark.parametrize(("licence", "images"), [("ids", 0), ("blur", 1)])
def test_licences_hold_for_comparisons(root: Path, tmp_path: Path, licence: str, images: int) -> None:
    with open_runs(["one", "two"], ["distill"], root) as inputs:
        build(inputs, tmp_path / "site", dataclasses.replace(SMALL, licence=licence))
    assert bool(list((tmp_path / "site/media").rglob("x*.jpg"))) == bool(images)
    assert (shard(tmp_path / "site", "stem/layer")["examples"][0]["sheet"] is not None) == bool(images)


def test_runs_without_dataset_examples_show_none(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 3)):
        (tmp_path / name).mkdir()
        write_atlas(tmp_path / name / "atlas.h5", examples=False, seed=seed)
    with open_runs(["one", "two"], ["distill"], tmp_path) as inputs:
        build(inputs, tmp_path / "site", SMALL)
    assert shard(tmp_path / "site", "stem/layer")["examples"] == []
    assert "examples" not in shard(tmp_path / "site", "stem/u0")["units"][0]


# ---------------------------------------------------------------------- facets


def add_facets(path: Path, channels: Sequence[int], count: Sequence[int], score: Sequence[float]) -> None:
    """Numbers of the facets of some units of stem."""
    with h5py.File(path, "r+") as file:
        group = "layers/stem/facets/units"
        write_array(file, f"{group}/channel", np.array(channels, np.int32))
        write_array(file, f"{group}/count", np.array(count, np.int32))
        write_array(file, f"{group}/monosemanticity", np.array(score, np.float32))


def test_facets_are_compared_where_they_differ(tmp_path: Path) -> None:
    for name in ("few", "many", "same", "none"):
        write_atlas(tmp_path / f"{name}.h5")
    for name in ("few", "same"):
        add_facets(tmp_path / f"{name}.h5", [0, 3], [1, 2], [0.75, 0.5])
    add_facets(tmp_path / "many.h5", [3, 0], [4, 1], [0.25, 0.5])
    found = compare(tmp_path, *(str(tmp_path / f"{name}.h5") for name in ("few", "none", "many")))
    units = found.units().set_index(["layer", "contender", "channel"]).sort_index()
    assert units.loc[("stem", "many.h5", 3), "facets"] == 4 and units.loc[("stem", "few.h5", 3), "facets"] == 2
    assert units.loc[("stem", "none.h5"), "facets"].isna().all() and np.isnan(
        units.loc[("stem", "few.h5", 1), "facets"]
    )
    row = found.summary().set_index(["layer", "measure", "contender", "against"])
    assert row.loc[("stem", "monosemanticity", "many.h5", "few.h5")]["median"] == -0.25
    same = compare(tmp_path, *(str(tmp_path / f"{name}.h5") for name in ("few", "same", "none")))
    assert "facets" not in same.units().columns
