"""The bench of a GPU is ready for the day when there is one: the same code, on a CPU."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).resolve().parents[2] / "scripts" / "benches"


@pytest.mark.long
def test_the_gpu_bench_measures_both_precisions(tmp_path: Path) -> None:
    asked = shlex.split("--device cpu --models resnet18 --every 20 --batch 2 --seconds 0.01 --out gpu.json")
    command = [sys.executable, str(BENCHES / "gpu.py"), *asked]
    environment = {"PYTHONPATH": str(BENCHES.parents[1]), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["device"] == "cpu" and not found["left"]
    assert {row["precision"] for row in found["rows"]} == {"float32", "bfloat16"}
    layers = [row["layer"] for row in found["rows"] if row["precision"] == "float32"]
    assert layers == ["conv1"]  # every twentieth
    for row in found["rows"]:
        assert row["image-steps/s"] > 0 and row["bare, ms"] > 0 and row["channels/h"] > 0
    for precision in ("float32", "bfloat16"):
        assert f"resnet18, {precision}, cpu: 4,800 channels in" in done.stdout


@pytest.mark.long
def test_the_listing_bench_measures_both_times(tmp_path: Path) -> None:
    asked = ["--images", "60", "--folders", "3", "--out", str(tmp_path), "--parts", "first,second"]
    command = [sys.executable, str(BENCHES / "listing.py"), *asked]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "images-60").rglob("*.png"))) == 60
    first, second = (line for line in done.stdout.splitlines() if "fingerprint" in line and "images" in line)
    assert first == second and first.startswith("  60 images")
