"""Block `tests`: the project's own tests that need a GPU."""

import re
import subprocess
import sys
from pathlib import Path

from gpu_blocks.bench import Bench

ROOT = Path(__file__).resolve().parents[3]
# Leaves room for the end of the block.
GRACE = 3.0


def run(bench: Bench) -> None:
    """Run the files with marked tests only: others import packages that a GPU machine may lack."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    own = Path("tests", "project", "test_benches.py")
    files = [str(path.relative_to(ROOT)) for path in files if path.relative_to(ROOT) != own]
    if not files:
        bench.row("pytest -m gpu", code=None, ok=None, said="no test is marked")
        return
    # Warnings of other versions of libraries are no errors here.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    limit = max(10.0, bench.left() - GRACE)
    try:
        done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        bench.row("pytest -m gpu", files=len(files), code=None, ok=False, said=f"not finished after {limit:.0f} s")
        return
    (bench.out / "pytest.log").write_text(done.stdout + done.stderr)
    failed = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE)
    said = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    # On a GPU, tests that are all skipped have shown nothing.
    ok = done.returncode == 0 and (bench.device != "cuda" or "passed" in said)
    bench.row(
        "pytest -m gpu", files=len(files), code=done.returncode, ok=ok, said=said[:200],
        failed=failed[:10],
    )  # fmt: skip
