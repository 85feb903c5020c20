"""The command line: verbs, Hydra's own flags, completion, and the two scripts."""

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import TINY, compose

from pipeline.cli.main import main
from pipeline.cli.overrides import split_compare
from pipeline.core.errors import AtlasError
from pipeline.core.interrupts import InterruptHandlers, raise_if_interrupted
from pipeline.planning.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_verb_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "atlas VERB" in capsys.readouterr().out


def test_an_unknown_verb_has_a_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rendr"]) == 2
    assert "Nearest: render" in capsys.readouterr().err


def test_hydras_help_and_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "render/canvas: fourier, image, laplacian, maco, pixel" in printed and "efficientnet_lite0" in printed
    assert main(["run", "--cfg", "job", "render=distill"]) == 0
    assert "steps: 160" in capsys.readouterr().out


def test_multirun_goes_through_all_choices(tmp_path: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [*TINY, "data=folder", f"data.root={photo_folder}", "run.root=runs", "run.name=m${render.steps}"]
    overrides = [o for o in overrides if not o.startswith("render.steps")]
    assert main(["plan", "--multirun", *overrides, "render.steps=2,3"]) == 0
    assert sorted(p.parent.name for p in tmp_path.glob("runs/*/plan.csv")) == ["m2", "m3"]
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("atlas ", "verify"),
        ("atlas ren", "render"),
        ("atlas run mod", "model="),
        ("atlas run render/can", "render/canvas="),
        ("atlas plan layers=con", "layers=convs"),
    ],
)
def test_completion_after_the_verb(
    line: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setattr(sys, "argv", ["atlas", "-sc", "query=bash"])
    assert main() == 0
    assert expected in capsys.readouterr().out.split()


def test_completion_can_be_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["atlas", "run", "-sc", "install=bash"])
    assert main() == 0
    assert "hydra_bash_completion atlas" in capsys.readouterr().out


def test_reading_verbs_list_the_runs_there_are(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *tiny_run]) == 0
    capsys.readouterr()
    for verb in ("status", "site", "verify"):
        assert main([verb, str(tmp_path / "tinny")]) == 2
        assert f"Runs in {tmp_path}: tiny" in capsys.readouterr().err


def setting(argument: str, key: str) -> Any:
    """The value with which a setting arrives when an argument is typed as it stands."""
    node: Any = compose([argument]).tree
    for part in key.split("."):
        node = node[part]
    return node


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("model.checkpoint", "/data/epoch=3-step=88.ckpt"),
        ("data.root", "/photos of #1"),
        ("data.root", "/photos/(copy)"),
        ("data.root", "/photos, 2024"),
        ("data.root", "/bob's photos"),
        ("data.root", 'the "best" of bob\'s'),
        ("data.root", "~/größe/写真"),
        ("data.root", "/a [b] {c}"),
        ("data.root", "/a & b; c! `d` <e>^"),
        ("data.root", "C:\\new=photos\\"),
        ("data.root", "[a"),
        ("data.root", "/costs ${x=1"),
        ("run.name", "lr=0.1,wd=0"),
        ("run.name", "2024"),
        ("run.name", "1e3"),
        ("run.name", "true"),
        ("run.name", "${nothing}"),
        ("run.name", "50% ${nothing}"),
    ],
)
def test_an_argument_that_needs_quotes_is_told_with_them(
    key: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"{key}={text}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(("atlas: ", f"atlas: {key}")) and "hydra.cc" not in told and key in told
    (typed,) = shlex.split(told.partition("ype ")[2].partition("; for a list")[0].strip().removesuffix("."))
    assert setting(typed, key) == text


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("layers.include=[conv#2,a b]", "layers.include", ["conv#2", "a b"]),
        ("layers.include=[0,1.0,layer1.0]", "layers.include", ["0", "1.0", "layer1.0"]),
        ("layers.include=['0', 1]", "layers.include", ["0", "1"]),
        ("model.arguments={a: b=c, n: 3, d: [x#1, 2]}", "model.arguments", {"a": "b=c", "n": 3, "d": ["x#1", 2]}),
        ("+render.transforms={f: g(1)}", "render.transforms", None),
    ],
)  # fmt: skip
def test_lists_and_mappings_keep_what_needs_no_quotes(
    argument: str, key: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", argument]) == 2
    told = capsys.readouterr().err
    assert "hydra.cc" not in told
    if value is not None:
        (typed,) = shlex.split(told.partition("ype ")[2].strip().removesuffix("."))
        assert setting(typed, key) == value


def test_what_needs_no_quotes_arrives_as_it_is() -> None:
    for key, text in (
        ("run.name", "50%_a+b@c"),
        ("data.root", "/my photos/a|b?c"),
        ("model.target", "C:\\net.py:build"),
    ):
        assert setting(f"{key}={text}", key) == text
    assert setting("run.name=m${render.steps}", "run.name") == f"m{compose([]).config.render.steps}"


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("model.checkpoint", "'model.checkpoint' has no value: write model.checkpoint=VALUE"),
        ("my key=3", "'my key' is not a setting"),
        ("(render.steps)=3", "is not a setting. Nearest: render.steps"),
        ("run.name=a,b", "for a list, 'run.name=[a,b]'; for a run with each of them, add --multirun"),
    ],
)
def test_arguments_that_quotes_do_not_mend(argument: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", argument]) == 2
    assert told in capsys.readouterr().err


def test_a_failing_disk_is_no_crash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers as the system raises them, and as HDF5 puts them into the text of its errors."""
    (tmp_path / "config.yaml").write_text("run: {}\n")
    for error in (OSError(errno.EIO, "Input/output error", "a.yaml"), RuntimeError("write failed (errno = 5, …)")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RunFolder, "existing", Mock(side_effect=error))
            assert main(["status", str(tmp_path)]) == 75
        told = capsys.readouterr().err
        assert "A disk or file server failed" in told and "the same command continues" in told
        assert "Traceback" not in told
    # An error in words whose cause is the disk.
    told_of = AtlasError("config.yaml can't be read.")
    told_of.__cause__ = OSError(errno.EIO, "Input/output error")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "existing", Mock(side_effect=told_of))
        assert main(["status", str(tmp_path)]) == 75
    assert "config.yaml can't be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bob's", 'the "best" run', "50%d", "lr=0.1", "a b, (c) #1", "${x}", "größe"])
def test_a_folder_by_position_may_be_called_anything(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bob's runs" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {}\n")
    assert main(["status", str(folder)]) == 0
    assert f"{folder}: 0 layers" in capsys.readouterr().out
    monkeypatch.chdir(folder.parent)
    for argument in (f"./{name}", f"{name}/"):
        assert main(["status", argument]) == 0
        assert f"{name}: 0 layers" in capsys.readouterr().out
    monkeypatch.chdir(folder)
    assert main(["status", "."]) == 0
    # Such a folder is a run for `atlas compare` too, and no setting.
    assert split_compare([str(folder)])[0].runs == (str(folder),)


def test_a_run_by_its_name_alone_lies_below_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("run: {}\n")
    assert main(["status", "mine"]) == 0


def test_the_command_to_publish_can_be_typed(tmp_path: Path) -> None:
    from pipeline.site.hosting import hosts

    site = tmp_path / "bob's runs" / "site; rm -r x"
    site.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "ours", lambda folder: True)
        for host in hosts.HOSTS:
            assert str(site) in shlex.split(hosts.prepare_for_host(site, host.key, "title")[1])


def test_a_users_own_folder_of_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "render" / "optimizer").mkdir(parents=True)
    (tmp_path / "render" / "optimizer" / "slow.yaml").write_text("name: adam\nlr: 0.001\n")
    assert main(["plan", "--cfg", "job", f"--config-dir={tmp_path}", "render/optimizer=slow"]) == 0
    assert "lr: 0.001" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["scripts/setup", "scripts/atlas", "scripts/test", ".ci/run"])
def test_scripts_are_sound(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.skipif(not (ROOT / ".venv" / ".installed").exists(), reason="this checkout has no .venv of its own")
@pytest.mark.long
def test_scripts_atlas_works_from_any_folder_without_pip(tmp_path: Path) -> None:
    # The first call may install what changed since; the second finds nothing to do.
    for _ in range(2):
        command = [ROOT / "scripts/atlas", "--version"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("atlas 0.") and not done.stderr


@pytest.mark.long
def test_a_reader_of_the_output_may_go_away() -> None:
    """As in `atlas --help | head -1`: no traceback."""
    script = "import sys; from pipeline.cli.main import main; sys.exit(main(['--help']))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == b""
    assert process.wait() == 141


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_connection_ends_a_run_in_order(kind: signal.Signals) -> None:
    before = signal.signal(kind, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with pytest.raises(KeyboardInterrupt), InterruptHandlers():
            os.kill(os.getpid(), kind)
            time.sleep(5)
    finally:
        signal.signal(kind, before)


def test_a_run_under_nohup_goes_on() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with InterruptHandlers():
            os.kill(os.getpid(), signal.SIGHUP)
            raise_if_interrupted()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
