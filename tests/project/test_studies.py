"""Studies: every plan composes, verdicts where the answer is known, pages with other settings, and one study, whole."""

import dataclasses
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.cli.compose import compose

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "studies"))

import analysis  # noqa: E402
import page  # noqa: E402
import plan as plans  # noqa: E402
from networks import efficientnet_lite, without_strides  # noqa: E402
from study_measures import prior, structure, vendi, winners  # noqa: E402

NAMES = plans.plan_names()
MADE = [name for name in NAMES if (page.PAGES / f"{name}.md").is_file()]


def composes(plan: plans.Plan, network: str, condition: str) -> None:
    config = compose(plan.overrides(network, condition)).config
    if plan.arms:
        assert [preset.name for preset in config.presets] == list(plan.arms)


@pytest.mark.parametrize("name", NAMES)
def test_every_plan_composes_and_names_its_own_arms(name: str) -> None:
    plan = plans.read_plan(name)
    composes(plan, plan.network_names[-1], list(plan.conditions)[-1])
    named = {"", *plan.arms}
    for hypothesis in plan.hypotheses.values():
        for arm in (hypothesis.arm, hypothesis.against):
            if isinstance(arm, str) and name != "prior":  # whose rows are kinds of arms
                condition, _, preset = arm.rpartition("/")
                assert preset in named or preset in plan.conditions, arm
                assert not condition or condition in plan.conditions
    tests = len(plan.hypotheses)
    assert 0 < tests <= 25, "with ten layers the least p value is 0.002: more tests could find nothing"


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_every_run_of_every_plan_composes(name: str) -> None:
    plan = plans.read_plan(name)
    for network in plan.network_names:
        for condition in plan.conditions:
            composes(plan, network, condition)


@pytest.mark.long
@pytest.mark.parametrize("name", MADE)
def test_a_page_says_whether_its_settings_have_changed(name: str, tmp_path: Path) -> None:
    made = page.PAGES / f"{name}.md"
    text = made.read_text()
    if "First edition" in text:
        return
    copy = tmp_path / made.name
    copy.write_text(text)
    page.mark_stale(copy, plans.read_plan(name))
    assert copy.read_text() == text, "scripts/study --status"


def test_the_index_is_that_of_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in page.PAGES.glob("*.md"):
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.setattr(page, "PAGES", tmp_path)
    page.write_index()
    assert (tmp_path / "README.md").read_text() == (ROOT / "docs" / "studies" / "README.md").read_text()


def test_a_page_with_other_settings_says_so_and_takes_it_back(tmp_path: Path) -> None:
    whole = plans.read_plan("mosaic")
    plan = dataclasses.replace(whole, networks=("efficientnet_lite0",), arms={"naive": whole.arms["naive"]})
    made = tmp_path / "mosaic.md"
    made.write_text(f"# One\n\n<!-- settings {plans.settings_digest(plan)} -->\n\nText.\n")
    before = made.read_text()
    assert not page.mark_stale(made, plan) and made.read_text() == before
    other = dataclasses.replace(plan, shared={"steps": 7})
    assert page.mark_stale(made, other) and "have changed since" in made.read_text()
    assert page.mark_stale(made, other) and made.read_text().count("have changed since") == 1
    assert not page.mark_stale(made, plan) and made.read_text() == before


def sample(effects: dict[str, float], noise: float = 0.1) -> pd.DataFrame:
    """Values of two arms in two networks of five layers with six units and three seeds; effects by network."""
    rng = np.random.default_rng(5)
    rows = []
    for network, effect in effects.items():
        for depth in range(5):
            for channel in range(6):
                base = rng.normal(5, 1)
                for variant in range(3):
                    for arm, shift in (("a", 0.0), ("b", effect)):
                        value = base + shift + noise * rng.normal()
                        rows.append((network, f"layer{depth}", depth, channel, arm, variant, value))
    return pd.DataFrame(rows, columns=["network", "layer", "depth", "channel", "arm", "variant", "value"])


def result_of(table: pd.DataFrame, expected: str = "higher", minimal: float = 0.2) -> analysis.Result:
    hypothesis = plans.Hypothesis("B is higher than a", "value", "b", expected, minimal, against="a")  # type: ignore[arg-type]
    plan = dataclasses.replace(plans.read_plan("mosaic"), hypotheses={"h": hypothesis})
    return analysis.analyze(plan, table)["h"]


def test_verdicts_are_those_of_known_effects() -> None:
    clear = result_of(sample({"x": 1.0, "y": 1.0}))
    assert clear.verdict == analysis.SUPPORTED and clear.effect.value == pytest.approx(1, abs=0.1)
    assert clear.effect.clusters == 10 and clear.p == pytest.approx(2 / 2**10)
    assert clear.sentence == "Yes: b is higher than a."
    assert result_of(sample({"x": 1.0, "y": 1.0}), "lower").verdict == analysis.CONTRADICTED
    assert result_of(sample({"x": 0.5, "y": 0.5}), minimal=2.0).verdict == analysis.SMALL
    assert result_of(sample({"x": 0.0, "y": 0.0})).verdict == analysis.NONE
    assert result_of(sample({"x": 0.0, "y": 0.0}, noise=3.0)).verdict == analysis.OPEN
    # A small effect in the other direction excludes the stated one, whether or not its p value is below 5 %.
    opposite = [result_of(sample({"x": -0.03, "y": -0.03}, noise=noise)) for noise in (0.02, 0.5)]
    assert opposite[0].p < analysis.LEVEL < opposite[1].p
    assert [result.verdict for result in opposite] == [analysis.NONE] * 2
    # A large effect in one network and a small opposite one in the other is no finding about both.
    assert result_of(sample({"x": 4.0, "y": -0.3}, noise=0.01)).verdict == analysis.OPEN


def test_a_trend_follows_the_depth_and_not_the_names_of_layers() -> None:
    table = sample({"x": 0.0, "y": 0.0}).assign(layer=lambda t: "l" + (9 - t["depth"]).astype(str))
    table["value"] = table["depth"] + table["channel"] / 100
    hypothesis = plans.Hypothesis("It rises", "value", "a", "higher", 0.3)
    plan = dataclasses.replace(plans.read_plan("mosaic"), hypotheses={"h": hypothesis})
    found = analysis.analyze(plan, table)["h"]
    assert found.effect.value == 1 and found.verdict == analysis.SUPPORTED


def test_numbers_have_three_digits() -> None:
    assert [analysis.number(v) for v in (0.0, 1.2345, 12.345, 123.4, 0.0567, -0.5, 0.0012, math.nan)] == [
        "0", "1.23", "12.3", "123", "0.0567", "-0.500", "0.001", "–",
    ]  # fmt: skip


def test_facets_count_what_differs() -> None:
    """Four answers: all alike, two and two, all unlike; about a mean that other units hold at zero."""
    basis = np.eye(8)
    alike, two, unlike = (basis[list(rows)] for rows in ((0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 2, 3)))
    units = np.stack([alike, two, unlike])
    found = vendi.effective_number(np.concatenate([units, -units]))  # the mean answer is 0
    assert found == pytest.approx([1, 2, 4, 1, 2, 4], abs=1e-6)


def test_variance_goes_where_it_comes_from() -> None:
    rng = np.random.default_rng(3)
    units, starts, both = rng.normal(size=(40, 1, 30)), rng.normal(size=(1, 40, 30)), rng.normal(size=(40, 40, 30))
    assert prior.components(units + 0 * starts) == pytest.approx((1, 0, 0), abs=1e-9)
    assert prior.components(0 * units + starts) == pytest.approx((0, 1, 0), abs=1e-9)
    assert prior.components(both) == pytest.approx((0, 0, 1), abs=0.01)
    # Standard deviations 1, 2 and 1: a sixth, two thirds, a sixth.
    assert prior.components(units + 2 * starts + both) == pytest.approx((1 / 6, 2 / 3, 1 / 6), abs=0.05)


def test_a_lattice_is_seen_at_the_periods_of_strides() -> None:
    rng = np.random.default_rng(4)
    noise = rng.normal(128, 20, (1, 64, 64, 3))
    _, x = np.indices((64, 64))
    found = {}
    for period in (4, 8, 5):
        stripes = 30 * np.cos(2 * np.pi * x / period)[None, :, :, None]
        found[period] = structure.lattice((noise + stripes).clip(0, 255).astype(np.uint8))[0]
    plain = structure.lattice(noise.clip(0, 255).astype(np.uint8))[0]
    assert 0.5 < plain < 2 and found[4] > 10 and found[8] > 10 and found[5] < 2


def test_winners_are_the_channels_with_the_largest_values() -> None:
    responses = np.array([[0.0, 3, 1, 2], [5, 4, 0, 1]])
    assert winners.winners(responses, 2) == [frozenset({1, 3}), frozenset({0, 1})]


def test_a_network_without_strides_computes_the_same_and_what_lies_between() -> None:
    import torch

    strided = efficientnet_lite(0).eval()
    dense = without_strides(efficientnet_lite(0)).eval()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def third_stage(module: torch.nn.Module) -> torch.Tensor:
        kept = []
        handle = module.blocks[2].register_forward_hook(lambda _, __, output: kept.append(output))
        with torch.no_grad():
            module(image)
        handle.remove()
        return kept[0]

    coarse, fine = third_stage(strided), third_stage(dense)
    assert coarse.shape[2:] == (8, 8) and fine.shape[2:] == (64, 64)
    assert torch.equal(third_stage(efficientnet_lite(0, whole_stages=3)), coarse)
    offsets = [fine[:, :, i::8, j::8] for i in range(8) for j in range(8)]
    assert min(float((coarse - other).abs().max()) for other in offsets) < 1e-4
    random = efficientnet_lite(0, trained=False)
    assert not torch.equal(random.conv_stem.weight, strided.conv_stem.weight)
    assert torch.equal(random.conv_stem.weight, efficientnet_lite(0, trained=False).conv_stem.weight)


def test_another_seed_is_another_set_of_seeds_for_the_same_number_of_runs() -> None:
    spec = importlib.util.spec_from_file_location("study_command", ROOT / "scripts" / "studies" / "__main__.py")
    assert spec is not None and spec.loader is not None
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    plan = plans.read_plan("diversity")
    seeds = []
    for settings in ((), ("run.seed=1",)):
        for condition in plan.conditions:
            chosen, run = command.arguments(plan, "diversity", "efficientnet_lite0", condition, settings)
            # The runs of another seed are continued by themselves, and never those of the study as planned.
            assert run.name.startswith("study-diversity-seed1-") == bool(settings)
            seeds.append([part for part in chosen if part.startswith("run.seed=")][-1])
            assert plan.arm_name(condition, "starts") == "starts"
    assert seeds == [f"run.seed={i}" for i in range(6)]
    assert plans.read_plan("structure").arm_name("random", "naive") == "random/naive"
    assert plans.read_plan("sparsity").arm_name("random", "") == "random"


def test_an_unknown_study_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"no study 'mosaics'.*mosaic"):
        plans.read_plan("mosaics")


@pytest.mark.long
def test_a_study_of_photographs_asks_for_them() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "studies"), "sparsity"]
    lacking = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert lacking.returncode == 1 and "data.root=FOLDER" in lacking.stderr


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_study_as_its_page_says(tmp_path: Path) -> None:
    """Smaller: two steps on small images. The page is written into the folder of the runs."""
    made = subprocess.run(
        [str(ROOT / "scripts" / "study"), "mosaic", f"run.root={tmp_path}", "run.name=small", "data.limit=24",
        "engine=inline",
         *(f"{at}.{key}" for at in ("render", "also.decorrelated_only", "also.robust_only", "also.distill")
           for key in ("steps=2", "size=32", "margin=4"))],
        capture_output=True, text=True, cwd=ROOT, timeout=800,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    text = (tmp_path / "study-mosaic.md").read_text()
    plan = plans.read_plan("mosaic")
    assert all(hypothesis.statement in text for hypothesis in plan.hypotheses.values())
    assert "60 units" not in text and "efficientnet_lite2" in text and (tmp_path / "study-mosaic.jpg").is_file()
    assert text.count("| `distill` |") == 1
    # The second time everything is there, and the page is the same but for the minutes.
    assert "Not decided" in text or "Yes" in text or "No" in text
