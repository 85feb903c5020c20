"""The lock of a run folder, also on file systems without `flock`, and after its holder was lost."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.core.errors import AtlasError
from pipeline.planning.folder import RunFolder
from pipeline.store import run_lock


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system as Lustre without the option flock, or FUSE."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)


def test_the_holder_is_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path).locked(), pytest.raises(AtlasError, match=rf"at work in .*: process {os.getpid()} on "):
        RunFolder(tmp_path).locked().__enter__()


def test_an_error_of_the_work_is_not_taken_for_a_held_lock(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match="a pipe"), RunFolder(tmp_path).locked():
        raise BlockingIOError(errno.EAGAIN, "a pipe")
    assert not RunFolder(tmp_path).is_running()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_flock_is_locked_by_a_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    folder = RunFolder(tmp_path / "run")
    for _ in range(2):
        with folder.locked():
            assert folder.is_running()
            with pytest.raises(AtlasError, match="Another atlas command is at work"):
                folder.locked().__enter__()
        assert not folder.is_running()
    assert [path.name for path in folder.path.iterdir()] == [".lock"]


def test_a_killed_process_leaves_no_lock(tmp_path: Path, without_flock: None) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    marker = tmp_path / ".lock.held"
    marker.write_text(json.dumps({"host": os.uname().nodename, "process": child.pid, "since": "now", "token": "1"}))
    with pytest.raises(AtlasError, match=f"process {child.pid} on"):
        RunFolder(tmp_path).locked().__enter__()
    child.kill()
    child.wait()
    with RunFolder(tmp_path).locked():
        assert json.loads(marker.read_text())["process"] == os.getpid()


def test_a_lost_host_is_waited_for(tmp_path: Path, without_flock: None) -> None:
    """Its last sign of life decides; its process number says nothing here."""
    marker = tmp_path / ".lock.held"
    marker.write_text(json.dumps({"host": "elsewhere", "process": os.getpid(), "since": "now", "token": "1"}))
    with pytest.raises(AtlasError, match="on elsewhere, since now"):
        RunFolder(tmp_path).locked().__enter__()
    before = time.time() - run_lock.PATIENCE - 5
    os.utime(marker, (before, before))
    with RunFolder(tmp_path).locked():
        assert RunFolder(tmp_path).is_running()
    assert not marker.exists()


def test_the_holder_shows_that_it_lives(tmp_path: Path, without_flock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.02)
    with RunFolder(tmp_path).locked():
        marker = tmp_path / ".lock.held"
        os.utime(marker, (1, 1))
        deadline = time.monotonic() + 5
        while marker.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert marker.stat().st_mtime > 2


def test_a_marker_of_another_mount_is_respected(tmp_path: Path) -> None:
    """One host may have flock on the same folder, and another not."""
    (tmp_path / ".lock.held").write_text(json.dumps({"host": "elsewhere", "process": 1, "since": "now"}))
    with pytest.raises(AtlasError, match="on elsewhere"):
        RunFolder(tmp_path).locked().__enter__()
