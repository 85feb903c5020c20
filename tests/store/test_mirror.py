"""A run folder in an object store and its working copies, on `memory://`."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from pipeline.core.errors import AtlasError, TryAgainError
from pipeline.store import mirror as mirrors
from pipeline.store import remote, remote_lock
from pipeline.store.mirror import Mirror, at_work
from pipeline.store.remote import RemoteFolder, local_root
from pipeline.store.run_lock import LockedError

URL = "memory://bucket/runs/mine"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """An empty store, in which a request that fails is repeated at once."""
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(remote_lock, "SETTLE", 0.0)
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def copy(tmp_path: Path, name: str) -> Mirror:
    (tmp_path / name).mkdir(exist_ok=True)
    return Mirror(URL, tmp_path / name)


def run(copied: Mirror, **files: str) -> None:
    """One command that writes files."""
    with at_work(copied):
        write(copied.folder, config_yaml="a: 1", **files)


def present(copied: Mirror) -> set[str]:
    return set(copied.remote.listing())


def test_another_machine_goes_on_with_what_the_store_has(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = copy(tmp_path, "one"), copy(tmp_path, "two")
    run(one, shards__a_h5="A", atlas_h5="1", site__index_html="page", site__old_js="old")
    assert present(one) == {".run-id", "config.yaml", "shards/a.h5", "atlas.h5", "site/index.html", "site/old.js"}
    with at_work(two):
        assert (two.folder / "shards/a.h5").read_text() == "A"
        write(two.folder, shards__b_h5="B", atlas_h5="2", site__new_js="new")
        (two.folder / "site/old.js").unlink()
    caplog.set_level("INFO")
    with at_work(one):
        assert (one.folder / "atlas.h5").read_text() == "2"
        assert not (one.folder / "site/old.js").exists()
    assert "fetching 3 files" in caplog.text  # what is the same is not transferred again
    expected = {"config.yaml", "shards/a.h5", "shards/b.h5", "atlas.h5", "site/index.html", "site/new.js"}
    assert present(one) == {".run-id", *expected}


def test_only_changed_content_is_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = copy(tmp_path, "one")
    run(one, site__index_html="page", site__a_js="a")
    uploaded: list[str] = []
    upload = RemoteFolder.upload

    def noted(self: RemoteFolder, path: Path, name: str) -> None:
        uploaded.append(name)
        upload(self, path, name)

    monkeypatch.setattr(RemoteFolder, "upload", noted)
    time.sleep(0.01)
    run(one, site__index_html="page", site__a_js="b")
    assert uploaded == ["site/a.js"]


def test_an_interrupted_upload_leaves_nothing_that_counts(
    tmp_path: Path, store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shard stays in the working copy, and the next command uploads it and removes the remains."""
    one = copy(tmp_path, "one")
    run(one)

    def half(path: str, place: str) -> None:
        store.pipe_file(place, Path(path).read_bytes()[:2])
        raise ConnectionResetError("in the middle")

    with monkeypatch.context() as broken:
        broken.setattr(type(store), "put_file", lambda self, path, place, **_: half(path, place))
        with pytest.raises(TryAgainError, match=r"in the middle.*is in .*one"), at_work(one):
            write(one.folder, shards__a_h5="shard")
    assert not any(name.endswith(".h5") for name in present(one)) and len(present(one)) > 2
    run(one)
    assert present(one) == {".run-id", "config.yaml", "shards/a.h5"}
    assert store.cat("/bucket/runs/mine/shards/a.h5") == b"shard"


def test_shards_are_published_while_the_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "PUBLISH_EVERY", 0.01)
    one = copy(tmp_path, "one")
    with at_work(one):
        write(one.folder, config_yaml="a: 1", shards__a_h5="A", atlas_h5="unfinished", **{"shards__b_h5_tmp-1": "half"})
        deadline = time.monotonic() + 10
        while "shards/a.h5" not in present(one) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert present(one) == {".lock", ".run-id", "config.yaml", "shards/a.h5"}


def test_failures_that_pass_are_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = copy(tmp_path, "one")
    find, failures = type(one.remote.files).find, [OSError("once"), OSError("twice")]

    def flaky(self: object, *arguments: object, **options: object) -> object:
        if failures:
            raise failures.pop()
        return find(self, *arguments, **options)

    monkeypatch.setattr(type(one.remote.files), "find", flaky)
    run(one)
    assert not failures and "config.yaml" in present(one)


def test_replaced_files_leave_the_store_and_nothing_else_does(tmp_path: Path, store: fsspec.AbstractFileSystem) -> None:
    store.pipe({f"/bucket/runs/{name}": b"of the user" for name in ("mine/notes.txt", "other/x", "mine2/y")})
    one, two = copy(tmp_path, "one"), copy(tmp_path, "two")
    run(one, shards__a_h5="A", shards__b_h5="B", shards__c_h5="C")
    with at_work(two):
        pass
    with at_work(one):
        (one.folder / "shards/a.h5").rename(one.folder / "shards/a.h5.damaged")
        (one.folder / "shards/b.h5").unlink()  # by hand: nothing finished is lost
        (one.folder / "shards/c.h5").unlink()
        one.removed([one.folder / "shards/c.h5"])
    kept = {".run-id", "config.yaml", "notes.txt", "shards/a.h5.damaged", "shards/b.h5"}
    assert present(one) == kept
    with at_work(two):  # where the shards still are
        pass
    assert present(two) == kept
    assert store.exists("/bucket/runs/other/x") and store.exists("/bucket/runs/mine2/y")
    store.rm("/bucket/runs/mine", recursive=True)
    with at_work(two):
        pass
    assert {"shards/a.h5", "shards/b.h5", "shards/c.h5"} <= present(two)


def test_the_working_copy_of_another_run_is_refused(tmp_path: Path, store: fsspec.AbstractFileSystem) -> None:
    one, two = copy(tmp_path, "one"), copy(tmp_path, "two")
    run(one)
    store.rm("/bucket/runs/mine", recursive=True)
    run(two)
    with pytest.raises(AtlasError, match=r"working copy of another run .* run\.scratch="):
        run(one)


def test_keys_that_lead_out_of_the_folder_are_no_files_of_a_run(
    tmp_path: Path, store: fsspec.AbstractFileSystem
) -> None:
    one, two = copy(tmp_path, "one"), copy(tmp_path, "two")
    run(one)
    store.store["/bucket/runs/mine/../../evil"] = store.store["/bucket/runs/mine/config.yaml"]
    store.store["/bucket/runs/mine/shards//evil"] = store.store["/bucket/runs/mine/config.yaml"]
    with at_work(two):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        2 * [".remote.json", ".run-id", "config.yaml"]
    )


def test_a_typed_error_creates_no_run(tmp_path: Path) -> None:
    one = copy(tmp_path, "one")
    with pytest.raises(AtlasError, match="typo"), at_work(one):
        raise AtlasError("typo")
    assert present(one) == set()


def test_the_lock(tmp_path: Path, store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second command is refused; the lock of a lost one is taken over."""
    one, two = copy(tmp_path, "one"), copy(tmp_path, "two")
    with at_work(one):
        assert remote_lock.is_held(two.remote)
        with pytest.raises(LockedError, match=f"process {os.getpid()} on "):
            run(two)
    assert not remote_lock.is_held(two.remote) and ".lock" not in present(two)
    lost = {"host": "h", "process": 1, "since": "s", "token": "t", "machine": "another"}
    two.remote.write(".lock", json.dumps(lost).encode())
    with pytest.raises(LockedError):
        run(one)
    monkeypatch.setattr(remote_lock, "PATIENCE", 0.0)
    run(one)
    monkeypatch.setattr(remote_lock, "PATIENCE", 120.0)
    gone = {**lost, "machine": remote_lock._machine(), "process": 2**22 + 1}  # beyond the largest number
    two.remote.write(".lock", json.dumps(gone).encode())
    run(one)


def test_who_lost_the_lock_publishes_shards_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_lock, "BEAT", 0.01)
    one = copy(tmp_path, "one")
    with pytest.raises(AtlasError, match="has taken over"), at_work(one):
        write(one.folder, config_yaml="a: 1", shards__a_h5="A", atlas_h5="1")
        one.remote.write(".lock", b'{"token": "of another"}')
        time.sleep(0.2)
    assert present(one) == {".lock", ".run-id", "config.yaml", "shards/a.h5"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "is no folder in an object store"),
        ("s3://bucket/../other", "is no folder in an object store"),
        ("s3://user:secret@bucket/runs", "must not contain a password"),
        ("nonsense://bucket/runs", "can't be opened"),
    ],
)
def test_wrong_urls(url: str, message: str) -> None:
    with pytest.raises(AtlasError, match=message) as caught:
        RemoteFolder(url)
    assert "secret" not in str(caught.value)


def test_the_command_that_installs_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"].__dict__["_registry"], "s3", raising=False)
    with pytest.raises(AtlasError, match=r"pip install 'neuron-atlas\[remote\]'"):
        RemoteFolder("s3://bucket/runs")


def test_working_copies_of_two_places_are_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_root("runs", None) == Path("runs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    places = {local_root(f"{url}/runs", None) for url in ("s3://a", "s3://b", "memory://a", "s3://a/b", "s3://a b")}
    assert len(places) == 5 and all(tmp_path in place.parents for place in places)
    assert local_root("s3://a/runs", str(tmp_path / "x")) == tmp_path / "x/s3/a/runs"
