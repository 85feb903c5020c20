"""Runs in an S3 server on loopback, through the command line: killed, continued elsewhere, published."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import pytest
from conftest import TINY

from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.planning.folder import RunFolder
from pipeline.store import shards

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of an S3 server with an empty bucket."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"), timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.2)
        yield address
    finally:
        process.kill()
        process.wait()


class StallingProxy:
    """Forwards requests to a server; the first upload of a shard stops in the middle, for ever.

    Attributes:
        address: Address of the proxy.
        stalled: Set once an upload has stopped.
    """

    def __init__(self, server: str) -> None:
        self._port = int(server.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listener]
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.stalled = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            upstream = socket.create_connection(("127.0.0.1", self._port))
            self._sockets += [client, upstream]
            threading.Thread(target=self._forward, args=(client, upstream), daemon=True).start()
            threading.Thread(target=self._copy, args=(upstream, client), daemon=True).start()

    def _forward(self, client: socket.socket, upstream: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(4096):
                line = data.split(b"\r\n", 1)[0]
                upstream.sendall(data)
                if line.startswith(b"PUT ") and b"/shards/" in line:
                    self.stalled.set()  # after the header and no more than a part of the content
                    return
            upstream.shutdown(socket.SHUT_WR)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End all connections."""
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def environment(address: str) -> dict[str, str]:
    own = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    return {**os.environ, **own, "AWS_DEFAULT_REGION": "us-east-1", "OMP_WAIT_POLICY": "passive"}


def start(arguments: Sequence[str], address: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(address), cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def atlas(arguments: Sequence[str], address: str) -> tuple[int, str]:
    """Exit code and output of a command."""
    process = start(arguments, address)
    output, errors = process.communicate(timeout=600)
    return process.returncode, output + errors


def store(address: str) -> fsspec.AbstractFileSystem:
    client = {"endpoint_url": address}
    return fsspec.filesystem("s3", key="test", secret="test", client_kwargs=client, use_listings_cache=False)


@pytest.mark.long
@pytest.mark.timeout(1200)  # ten commands, each of which loads PyTorch
def test_a_run_that_is_killed_in_an_upload_goes_on_elsewhere(server: str, photo_folder: Path, tmp_path: Path) -> None:
    own = [*TINY, "data=folder", f"data.root={photo_folder}", "run.root=s3://bucket/runs", "run.name=tiny"]
    url, proxy = "s3://bucket/runs/tiny", StallingProxy(server)
    first = start(["run", *own, f"run.scratch={tmp_path}/one"], proxy.address)
    assert proxy.stalled.wait(120), first.communicate(timeout=30)
    refused, message = atlas(["run", *own, f"run.scratch={tmp_path}/two"], server)
    assert refused == 2 and f"Another atlas command is at work in {url}: process {first.pid} on " in message
    first.send_signal(signal.SIGKILL)
    first.communicate()
    proxy.close()

    files = store(server)
    uploaded = [name for name in files.find("bucket/runs/tiny") if name.endswith(".h5")]
    for name in uploaded:  # an object that is there is whole
        files.get(name, str(tmp_path / "whole.h5"))
        found = shards.read(tmp_path / "whole.h5")
        assert found is not None and not found.damage()
    here = list((tmp_path / "one").rglob("*.h5"))
    assert len(here) > len(uploaded)

    # The same machine goes on: what was finished here is not made again. Then another machine, which has nothing.
    code, message = atlas(["render", *own, f"run.scratch={tmp_path}/one"], server)
    assert code == 0 and "left behind and is taken over" in message
    assert {path.name for path in here} <= {name.rpartition("/")[2] for name in files.find(url.removeprefix("s3://"))}
    code, message = atlas(["run", *own, f"run.scratch={tmp_path}/two"], server)
    assert code == 0 and f"{url} is complete" in message and "fetching" in message
    for verb, answer in {"status": "complete since", "verify": "intact", "compact": "shards deleted"}.items():
        code, message = atlas([verb, url, f"run.scratch={tmp_path}/three"], server)
        assert code == 0 and answer in message, message
    code, message = atlas(["run", *own, f"run.scratch={tmp_path}/four"], server)
    assert code == 0 and "Nothing is missing" in message

    # The site is readable where it was published, with the types that browsers need.
    types = {"index.html": "text/html", "unit.html": "text/html"}
    scripts = [name for name in files.find("bucket/runs/tiny/site") if name.endswith(".js")]
    types |= {scripts[0].partition("/site/")[2]: "text/javascript"}
    for name, kind in types.items():
        with urllib.request.urlopen(files.sign(f"{url.removeprefix('s3://')}/site/{name}"), timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith(kind) and answer.read()
    assert not [name for name in files.find("bucket") if "/.lock" in name or ".tmp-" in name]


@pytest.mark.long
def test_a_store_that_cannot_be_reached(server: str, tmp_path: Path) -> None:
    wrong = f"http://127.0.0.1:{free_port()}"
    code, message = atlas(["status", "s3://bucket/runs/none", f"run.scratch={tmp_path}"], server)
    assert code == 2 and "There is no run at s3://bucket/runs/none" in message
    code, message = atlas(["plan", *TINY, "run.root=s3://nowhere/runs", f"run.scratch={tmp_path}"], server)
    assert code == 2 and "bucket does not exist" in message
    code, message = atlas(["status", "s3://bucket/runs/none", f"run.scratch={tmp_path}"], wrong)
    assert code == 75 and "run the same command again" in message
    assert not list(tmp_path.rglob("*.yaml"))


@pytest.fixture
def moved(finished: Path) -> Iterator[RunFolder]:
    """A finished run of this machine in `memory://`, whose working copy is its folder."""
    folder = RunFolder(finished, "memory://bucket/runs/tiny")
    with folder.locked():
        pass
    yield folder
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_verbs_take_the_url_of_a_run(moved: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, answer in {"status": "complete since", "repair": "nothing is damaged"}.items():
        assert main([verb, moved.url, f"run.scratch={tmp_path}/{verb}"]) == 0
        assert f"{moved.url}: " in (output := capsys.readouterr().out) and answer in output
    assert not list((tmp_path / "status").rglob("*.h5"))  # nothing is fetched that is not read
    with pytest.raises(AtlasError, match="at work in memory://bucket/runs/tiny"), moved.locked():
        RunFolder(tmp_path / "another", moved.url).locked().__enter__()


@pytest.mark.long
def test_a_finished_run_is_continued_on_another_machine(
    moved: RunFolder, tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of this machine is moved to a store, and nothing of it is made again there, nor in a run based on it."""
    own = [*tiny_run, "run.root=memory://bucket/runs", f"run.scratch={tmp_path}/copies"]
    assert main(["run", *own]) == 0
    assert "Nothing is missing" in capsys.readouterr().err
    assert main(["verify", moved.url, f"run.scratch={tmp_path}/verify"]) == 0
    assert main(["run", *own, "run.name=again", f"base={moved.url}", "engine.shared_fs=false"]) == 0
    assert "from " in capsys.readouterr().out
