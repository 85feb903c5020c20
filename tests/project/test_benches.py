"""The bench of a GPU is ready for the day when there is one: the same code, on a CPU."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.machine import cache_folder

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "benches"))

from gpu import BLOCKS, RESERVE, Block, fits, schedule, supervise
from gpu_blocks.extrapolation import Point, interpolated, minutes
from gpu_blocks.levers import Switch
from gpu_blocks.report import STATES, criteria, table
from gpu_blocks.rows import rows_of

BENCHES = Path(__file__).resolve().parents[2] / "scripts" / "benches"


def gpu(*arguments: str, python: str = sys.executable, limit: float = 280, **more: str) -> str:
    """Run the GPU bench without anything in the environment that a GPU machine may not have; return what it printed."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": more.get("HOME", "/tmp"), "PYTHONPATH": more.get("PYTHONPATH", "")}
    done = subprocess.run(
        [python, str(BENCHES / "gpu.py"), *arguments], env=environment, capture_output=True, text=True, timeout=limit
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
def test_the_gpu_bench_runs_in_the_ordinary_environment(tmp_path: Path) -> None:
    """Without a carried folder, in small sizes on the CPU."""
    blocks = "environment,batches,whole,memory"
    said = gpu("--device", "cpu", "--minutes", "1", "--out", str(tmp_path), "--blocks", blocks)
    found = rows_of(tmp_path)
    assert [row["block"] for row in found if row["what"] == "done"] == blocks.split(",")
    batches = [row for row in found if row["what"] == "batch"]
    assert [row["batch"] for row in batches] == [1, 2] and all(row["ms an image-step"] > 0 for row in batches)
    (whole,) = (row for row in found if row["what"] == "layer, end to end" and not row["off"])
    assert whole["complete"] and whole["units"] == 4
    assert "DRY RUN      nothing lost when memory runs out: 4 of 4 images, in batches of 2" in said
    assert "NOT MEASURED correctness" in said
    assert (tmp_path / "gpu.txt").read_text() in said


# What a GPU machine has: of these PyTorch and torchvision in exactly these versions, and no others of the project.
ON_A_GPU_MACHINE = (
    "torch==2.11.0", "torchvision==0.26.0", "timm", "h5py", "pandas", "pyarrow", "safetensors", "psutil", "rich",
    "pyyaml", "scipy", "scikit-image", "scikit-learn", "tqdm", "pytest", "pytest-timeout", "pytest-xdist", "hypothesis",
    "Jinja2",
)  # fmt: skip


def gpu_machine() -> tuple[str, str]:
    """Return a Python with only what a GPU machine has, made once and kept in the cache, and its version."""
    candidates = ["python3.12", *map(str, Path.home().glob(".pyenv/versions/3.12*/bin/python")), sys.executable]
    code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for base in candidates:
        try:  # a version manager's shim may stand for no Python
            version = subprocess.run([base, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
            break
        except (OSError, subprocess.CalledProcessError):
            continue
    else:
        raise AssertionError("no Python has venv")
    name = hashlib.sha256(repr((base, ON_A_GPU_MACHINE)).encode()).hexdigest()[:12]
    folder = cache_folder("tests") / f"gpu-machine-{name}"
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        for former in folder.parent.glob("gpu-machine-*"):  # 6 GB each
            shutil.rmtree(former, ignore_errors=True)
        subprocess.run([base, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
        subprocess.run([*pip, *ON_A_GPU_MACHINE], check=True, timeout=1000)
        (folder / "complete").touch()
    return str(python), version


@pytest.mark.long
@pytest.mark.timeout(2100)
def test_the_gpu_bench_runs_on_a_machine_with_only_what_a_gpu_machine_has(tmp_path: Path) -> None:
    """As docs/performance.md says: prepared here, then run in the working tree by a Python without Ray and Hydra."""
    python, version = gpu_machine()
    absent = ("ray", "hydra", "omegaconf", "antlr4", "pydantic", "pipeline")
    code = f"import importlib.util as u; print([m for m in {absent} if u.find_spec(m)])"
    found = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
    carried = tmp_path / "carried"
    command = [sys.executable, str(BENCHES / "gpu.py"), "prepare", str(carried), "--python", version]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    asked = ("--carried", str(carried), "--device", "cpu", "--minutes", "1", "--out", str(out))
    said = gpu(*asked, python=python, limit=500, HOME=str(tmp_path))
    states = {row["block"]: row["what"] for row in rows_of(out) if row["what"] in STATES}
    assert states == dict.fromkeys((block.name for block in BLOCKS), "done")
    assert len(said[said.index("== environment") :]) < 12_000
    assert "DRY RUN      correctness" in said
    assert all(row["ok"] for row in rows_of(out) if row.get("ok") is not None)
    assert len(list(out.iterdir())) <= 8


def test_the_time_of_all_channels_follows_the_cost_of_each_layer() -> None:
    """Layers between two measured ones are not counted with the seconds of a neighbour."""
    points = [Point(1.0, 2, 0.2, 4.0, 1.0, 0.1), Point(3.0, 2, 0.6, 8.0, 3.0, 0.3)]
    # A layer of 2 GFLOP: 0.4 s a step of two images, 6 s for its first steps, 2 s besides.
    loop, whole, bare = minutes(points, [(2.0, 60)], steps=20, first_steps=10)
    assert loop == pytest.approx((6 + 10 * 0.4) / 2) and whole == pytest.approx(loop + 1.0)
    assert bare == pytest.approx(20 * 0.2 / 2)
    # The cheapest one measured stands for cheaper ones, the most expensive one in proportion for more expensive ones.
    known = [(1.0, 5.0), (2.0, 10.0)]
    assert [interpolated(known, x) for x in (0.1, 1.0, 1.5, 4.0)] == [5.0, 5.0, 7.5, 20.0]


def good_rows() -> list[dict[str, Any]]:
    key = "with starts and evaluation min"
    atlas = {"block": "layers", "what": "all channels", "precision": "bfloat16", "loop min": 4.0, "of bare": 0.97}
    return [
        {"block": "correctness", "what": "responses", "value": 0.1, "limit": 1.0, "ok": True},
        {"block": "correctness", "what": "done", "seconds": 1.0},
        {**atlas, "canvas": "224 px", key: 14.9},
        {**atlas, "canvas": "own canvas", key: 5.9},
        {"block": "layers", "what": "layer", "layer": "conv1", "px": 224, "precision": "bfloat16", "of bare": 0.93},
        {
            "block": "lucent", "what": "against Lucent", "times faster a channel": 400.0,
            "times faster than its best batched loop a channel": 9.0,
        },
        {"block": "dataset", "what": "decoding alone", "images/s": 700.0},
        {"block": "dataset", "what": "whole first pass", "images/s": 690.0},
        {"block": "processes", "what": "processes", "processes": 2, "of one process": 1.1},
        {"block": "memory", "what": "out of memory", "ok": True, "halved": True, "images": 9, "asked": 9, "fits": 4},
        {"block": "tests", "what": "pytest -m gpu", "ok": True, "said": "3 passed"},
    ]  # fmt: skip


WRONG = {
    0: {"ok": False}, 2: {"with starts and evaluation min": 15.1}, 3: {"with starts and evaluation min": 6.1},
    4: {"of bare": 0.89}, 5: {"times faster a channel": 99.0}, 7: {"images/s": 600.0}, 8: {"of one process": 0.9},
    9: {"ok": False}, 10: {"ok": False},
}  # fmt: skip


def test_the_goals_are_met_missed_or_not_measured() -> None:
    good = good_rows()
    assert [criterion.met for criterion in criteria(good)] == [True] * 9
    assert [criterion.met for criterion in criteria([])] == [None] * 9
    for i, change in WRONG.items():
        rows = [{**row, **change} if j == i else row for j, row in enumerate(good)]
        assert sum(criterion.met is False for criterion in criteria(rows)) == 1, change
    # A comparison that was left out is none that passed.
    assert criteria([row for row in good if row["what"] != "done"])[0].met is None
    printed = table(good, ["correctness", "layers"], judged=True)
    assert printed.count("PASS") == 9 and "DRY RUN" not in printed
    assert table(good, ["correctness"], judged=False).count("DRY RUN") == 9
    many = [{"block": "layers", "what": "other", **{f"column {i}": 1.0 for i in range(9)}} for _ in range(500)]
    assert len(table([*good, *many], ["layers"], judged=True)) < 12_000
    # A row that a goal cannot read costs neither the table nor another goal.
    odd = table([*good, {"block": "layers", "what": "layer"}], ["layers"], judged=True)
    assert odd.count("PASS") == 8 and "NOT MEASURED bare: KeyError" in odd


def test_a_block_may_use_what_blocks_before_it_left_over() -> None:
    blocks = [Block("a", "x:run", 10), Block("b", "x:run", 30)]
    found = schedule(blocks, 1000.0, 1000.0 + 80 + RESERVE)
    assert found == {"a": (20.0, 1020.0), "b": (60.0, 1080.0)}


# Takes the place of gpu.py as the process of the blocks.
MEMBER = """
import json, os, sys, time
member = json.loads(sys.argv[-1])
def row(**values):
    with open(os.path.join(member["out"], "gpu.jsonl"), "a") as file:
        file.write(json.dumps(values) + chr(10))
for name in member["blocks"]:
    row(block=name, what="started", kill=time.time() + (1 if name == "hangs" else 60))
    if name == "dies":
        sys.exit("no more of this")
    if name == "hangs":
        time.sleep(60)
    if name == "loses":
        row(block=name, what="failed", seconds=0.0, reason="lost")
        os._exit(70)
    row(block=name, what="done", seconds=0.0)
"""


def test_a_block_that_dies_hangs_or_loses_the_gpu_costs_no_other(tmp_path: Path) -> None:
    names = ["first", "dies", "second", "hangs", "loses", "last"]
    member = {"out": str(tmp_path), "blocks": names, "end": time.time() + 100}
    supervise([sys.executable, "-c", MEMBER], member, dict(os.environ))
    states = {row["block"]: row for row in rows_of(tmp_path) if row["what"] in ("done", "failed", "killed", "skipped")}
    expected = ["done", "killed", "done", "killed", "failed", "done"]
    assert [states[name]["what"] for name in names] == expected
    assert "no more of this" in states["dies"]["reason"] and "in its time" in states["hangs"]["reason"]


def test_the_end_of_the_time_ends_the_blocks(tmp_path: Path) -> None:
    member = {"out": str(tmp_path), "blocks": ["hangs", "last"], "end": time.time() + 0.5}
    supervise([sys.executable, "-c", MEMBER.replace("+ (1", "+ (60")], member, dict(os.environ))
    states = {row["block"]: row["what"] for row in rows_of(tmp_path) if row["what"] != "started"}
    assert states == {"hangs": "killed", "last": "skipped"}


def test_wheels_of_another_python_are_left_out() -> None:
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert fits("a-1.0-py3-none-any.whl") and fits("a-1.0-py2.py3-none-any.whl")
    assert fits(f"a_b-1.0-{own}-{own}-manylinux_2_17_x86_64.manylinux2014_x86_64.whl")
    assert not fits("a_b-1.0-cp39-cp39-manylinux_2_17_x86_64.whl")


def test_a_lever_says_what_the_code_lacks_and_restores_what_it_changes() -> None:
    import pipeline.visualization.loop as loop

    assert Switch(engine={"batch": 4}).missing() == "" and "speed" in Switch(engine={"speed": 4}).missing()
    assert "no nothing" in Switch(attributes=(("pipeline.visualization.loop", "nothing", 1),)).missing()
    assert "pipeline.nowhere" in Switch(attributes=(("pipeline.nowhere", "x", 1),)).missing()
    before = loop.evaluate
    switch = Switch(attributes=(("pipeline.visualization.loop", "evaluate", 1),), environment={"A_LEVER": "on"})
    assert switch.missing() == ""
    with switch.applied():
        assert loop.evaluate == 1 and os.environ["A_LEVER"] == "on"
    assert loop.evaluate is before and "A_LEVER" not in os.environ


@pytest.mark.long
def test_the_listing_bench_measures_both_times(tmp_path: Path) -> None:
    asked = ["--images", "60", "--folders", "3", "--out", str(tmp_path), "--parts", "first,second"]
    command = [sys.executable, str(BENCHES / "listing.py"), *asked]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "images-60").rglob("*.png"))) == 60
    first, second = (line for line in done.stdout.splitlines() if "fingerprint" in line and "images" in line)
    assert first == second and first.startswith("  60 images")
