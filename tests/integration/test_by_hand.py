"""The section "By hand" of jobs/README.md: its commands, on two machines with only the system's programs on PATH."""

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from machines import ROOT, Machine, available, installed_project, processes_of, running, wait_for

import pipeline

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not available(), reason="needs namespaces: root, unshare, nsenter and ip"),
]


def blocks(section: str) -> list[str]:
    """The shell commands of a section of the page."""
    text = (ROOT / "jobs" / "README.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", text, re.DOTALL)


def test_a_cluster_started_by_hand(tmp_path: Path, tiny_run: list[str]) -> None:
    exports, head, node, run, end = blocks("By hand")
    folder, own = Path(tempfile.mkdtemp(prefix="at-")), Path("/tmp/ray-atlas")
    made = not own.exists()
    own.mkdir(exist_ok=True)
    project = installed_project(tmp_path / "project")
    (folder / ".atlas-token").write_text("c" * 64)
    machines = {name: Machine(name, f"10.0.0.{i}", empty=(own,)) for i, name in enumerate(("first", "second"), start=1)}
    settings = [o for o in tiny_run if not o.startswith(("engine=", "run."))]
    run = run.replace("experiment=overnight", " ".join(settings)).replace("/shared/runs", str(tmp_path))
    try:
        with running(list(machines.values()), folder) as firsts:

            def shell(name: str, command: str) -> subprocess.CompletedProcess[str]:
                enter = machines[name].enter(firsts[name])
                variables = ["PATH=/usr/bin:/bin", f"HOME={folder}", "LANG=C.UTF-8"]
                done = subprocess.run(
                    [*enter, "env", "-i", *variables, "bash", "-ec", f"cd {project}; {exports}\n{command}"],
                    stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400,
                )  # fmt: skip
                assert done.returncode == 0, done.stdout + done.stderr
                return done

            # One core each, so that the other node has a worker: this is all that the commands are given in addition.
            shell("first", head.replace("ray start", "ray start --num-cpus=1"))
            shell("second", node.replace("ray start", "ray start --num-cpus=1"))
            shell("first", f"{run.rstrip()} engine.cpus_per_worker=1 render.steps=100 engine.task_seconds=1")
            for name in machines:
                shell(name, end)
            wait_for(lambda: not any(processes_of(first) for first in firsts.values()), 60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if made:
            own.rmdir()
    with pipeline.open_atlas(tmp_path / "overnight") as atlas:
        assert len(atlas.units()) == 15
    report = json.loads((tmp_path / "overnight" / "status.json").read_text())["report"]
    assert {worker["name"].partition(":")[0] for worker in report["workers"]} == {"first", "second"}
