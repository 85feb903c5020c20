"""Limits of the code's structure, and what an import loads."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each process that writes a site begins with this.
SITE_WORKERS = "pipeline.site.workers"


def structure(*arguments: str) -> str:
    command = [sys.executable, ROOT / "scripts" / "structure", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_sizes() -> None:
    lines = dict(line.split(": ", 1) for line in structure().splitlines() if ": " in line)
    assert lines["cycles"] == "none"
    assert lines["functions over 60 lines"] == "0"
    assert lines["functions of more than 7 parameters"] == "0"
    sizes = [entry.rsplit(" ", 1) for entry in lines["modules per package"].split(", ")]
    assert {name: int(count) for name, count in sizes if int(count) > 16} == {}


def test_the_diagram_in_the_docs_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert structure("--diagram").strip() in page


def test_an_import_against_the_layers_is_found(tmp_path: Path) -> None:
    """The contract passes on the code as it is, and fails on a copy with one wrong import."""
    import shutil

    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]

    def lint() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert lint().returncode == 0
    with (tmp_path / "pipeline" / "core" / "seeds.py").open("a") as file:
        file.write("\nfrom pipeline.runs import runner\n")
    wrong = lint()
    assert wrong.returncode == 1 and "pipeline.core.seeds -> pipeline.runs.runner" in wrong.stdout


@pytest.mark.parametrize(
    "module",
    ["pipeline", "pipeline.config", "pipeline.core.registry", "pipeline.site.config", "pipeline.store", SITE_WORKERS],
)
def test_what_an_import_does_not_load(module: str) -> None:
    slow = ("torch", "jinja2", "ray", "hydra", "scipy.stats", "sklearn")
    code = f"import sys, {module}; print([m for m in {slow} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
