"""The folder of a run may come from anyone: no command executes what it names unless `run.trust=true` is typed."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.cli.main import main
from pipeline.models import zoo

COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "verify": lambda run: ["verify", str(run)],
    "verify as the folder asks for": lambda run: ["verify", str(run), "run.check=15"],
    "repair": lambda run: ["repair", str(run)],
    "compact": lambda run: ["compact", str(run)],
    "status": lambda run: ["status", str(run)],
    "site": lambda run: ["site", str(run), "site.workers=1"],
    "publish": lambda run: ["publish", "bucket", str(run)],
    "export": lambda run: ["export", str(run), "--csv"],
    "compare": lambda run: ["compare", str(run), str(run.parent / "other"), f"out={run.parent / 'compared'}"],
}


class Evil:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def foreign(run: Path, tmp_path: Path, model: dict[str, Any]) -> Path:
    """A copy of a run whose configuration names the network of a stranger, and says that it is trusted."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["model"] |= model
    tree["run"]["trust"] = True
    tree["render"]["objective"] = {"name": f"{tmp_path / 'evil.py'}:Member"}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef build(): raise SystemExit\n"
    )
    return run


def hostile_networks(tmp_path: Path) -> dict[str, dict[str, Any]]:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    return {
        "code": {"source": "custom", "target": f"{tmp_path / 'evil.py'}:build"},
        "shell": {"source": "custom", "target": "os:system", "arguments": {"command": f"touch {tmp_path / 'ran'}"}},
        "pickle": {"checkpoint": str(tmp_path / "evil.pth"), "trust_checkpoint": True},
    }


@pytest.mark.parametrize(
    ("network", "command"),
    [*(("code", command) for command in COMMANDS), ("shell", "verify"), ("pickle", "verify"), ("pickle", "compact")],
)
def test_no_command_on_a_run_folder_executes_what_it_names(
    finished: Path, tmp_path: Path, network: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the code of a configuration, nor any network at all: looking at results needs none."""
    run = foreign(finished, tmp_path, hostile_networks(tmp_path)[network])
    shutil.copytree(run, tmp_path / "other")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    for source in zoo.SOURCES:
        monkeypatch.setitem(zoo.SOURCES, source, refuse)
    assert main(COMMANDS[command](run)) == 0
    assert not (tmp_path / "ran").exists()


def test_verify_says_what_it_left_out_and_what_that_would_execute(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = foreign(finished, tmp_path, hostile_networks(tmp_path)["shell"])
    assert main(["verify", str(run)]) == 0
    told = capsys.readouterr().err
    for what in (
        "No visualization was rendered again",
        "run.trust=true",
        "model.target='os:system'",
        "touch",
        "Member",
    ):
        assert what in told, what
    # Nothing is to be said where nothing was asked for.
    assert main(["verify", str(run), "run.check=0"]) == 0
    assert "run.trust" not in capsys.readouterr().err


def test_code_is_executed_once_the_user_says_so(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = foreign(finished, tmp_path, {"source": "custom", "target": f"{tmp_path / 'evil.py'}:build"})
    assert main(["verify", str(run), "run.trust=true"]) == 2
    assert (tmp_path / "ran").exists()


def test_the_run_that_a_base_names_executes_nothing(finished: Path, tmp_path: Path) -> None:
    """Nor does one beside it, whose dataset pass is looked at."""
    run = foreign(finished, tmp_path, {"source": "custom", "target": f"{tmp_path / 'evil.py'}:build"})
    from pipeline.planning.base_run import read_config
    from pipeline.planning.folder import RunFolder

    assert read_config(RunFolder(run)) is None and not (tmp_path / "ran").exists()


def test_a_pickle_of_this_test_would_run(tmp_path: Path) -> None:
    hostile_networks(tmp_path)
    pickle.loads((tmp_path / "evil.pth").read_bytes())
    assert (tmp_path / "ran").exists()
