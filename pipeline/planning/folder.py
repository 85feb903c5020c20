"""The folder of a run: the paths in it, its lock, and its configuration, status and failure files."""

import contextlib
import csv
import dataclasses
import datetime
import functools
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.config.defaults import complete_preset
from pipeline.config.schema import FREE_SECTIONS, differences
from pipeline.core.atomic_io import atomic_path
from pipeline.core.config_files import decode_text, load_yaml
from pipeline.core.errors import AtlasError
from pipeline.data.config import DataConfig
from pipeline.store import remote_lock, run_lock
from pipeline.store.mirror import Mirror, at_work
from pipeline.store.run_lock import LockedError

# Settings of the dataset that change no result.
FREE_DATA = ("relist", "download")

# Settings of the dataset that older versions did not store; without a value they change nothing.
LATER_DATA = ("name", "split")

# The way out of a damaged config.yaml.
_RESTORE = (
    "`atlas run` with the settings of this run and run.update=true writes it again, and keeps the results that agree "
    "with them; atlas.h5 has a copy of the settings, provenance/config."
)


class RunFolder:
    """Paths and small files of `runs/<name>/`.

    A run in an object store has a working copy on this machine, with the same files (`pipeline.store.mirror`).

    Attributes:
        path: The folder itself.
        url: URL of the folder in an object store, of which `path` is the working copy; empty if there is none.
        config: config.yaml, the configuration of the run.
        plan: plan.csv, the table of layers and channels.
        shards: shards/, finished work in parts.
        atlas: atlas.h5, all results in one file.
        failures: failures.csv.
        status: status.json, read by `atlas status`.
        site: site/, the generated pages.
        lock: .lock, the file that `locked` locks.
    """

    def __init__(self, path: Path, url: str = "") -> None:
        self.path, self.url = path, url
        self.config = path / "config.yaml"
        self.plan = path / "plan.csv"
        self.shards = path / "shards"
        self.atlas = path / "atlas.h5"
        self.failures = path / "failures.csv"
        self.status = path / "status.json"
        self.site = path / "site"
        self.lock = path / ".lock"

    def __str__(self) -> str:
        return self.url or str(self.path)

    @functools.cached_property
    def _mirror(self) -> Mirror | None:
        return Mirror(self.url, self.path) if self.url else None

    def existing(self, *parts: str) -> "RunFolder":
        """Return this folder if it holds a run; fetch its small files if it is in an object store.

        Args:
            parts: Names of folders and large files that are fetched, too.

        Raises:
            AtlasError: If it holds none; the message lists the runs beside it.
            TryAgainError: If the store can't be read.
        """
        if self._mirror is not None:
            self._fetch(self._mirror, parts)
        if not self.config.is_file():
            if self.url:
                raise AtlasError(f"There is no run at {self.url}. `atlas run` makes one.")
            runs = sorted(p.parent.name for p in self.path.parent.glob("*/config.yaml"))
            hint = f"Runs in {self.path.parent}: {', '.join(runs)}." if runs else "`atlas run` makes one."
            raise AtlasError(f"There is no run at {self.path}. {hint}")
        return self

    def _fetch(self, mirror: Mirror, parts: Sequence[str]) -> None:
        """Fetch parts of a run, unless a command is at work in the working copy, which then has them."""
        if self.path.exists():
            try:
                with run_lock.held(self.lock):
                    mirror.fetch(parts)
            except LockedError:
                return
        else:
            mirror.fetch(parts)

    def note_removed(self, paths: Collection[Path]) -> None:
        """Note files that were removed on purpose: an object store removes them, too, when the lock is released."""
        if self._mirror is not None:
            self._mirror.removed(paths)

    def read_config(self) -> dict[str, Any]:
        """Return config.yaml as plain data.

        Raises:
            AtlasError: If it can't be read, or is not a mapping of settings.
        """
        try:
            tree = load_yaml(decode_text(self.config.read_bytes(), str(self.config)), str(self.config))
        except OSError as error:
            raise AtlasError(f"{self.config} can't be read: {error.strerror or error}.") from error
        except AtlasError as error:
            raise AtlasError(f"{error} {_RESTORE}") from None
        if not isinstance(tree, dict):
            raise AtlasError(f"{self.config} holds no settings. {_RESTORE}")
        return tree

    def check_writable(self) -> None:
        """Check that this folder can be written to, or made, before any work.

        Raises:
            AtlasError: If it can't be.
        """
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            raise AtlasError(
                f"{existing} can't be written to, so that there is no place for the run {self.path}: choose another "
                f"folder, {self._setting}"
            )

    @property
    def _setting(self) -> str:
        """The setting that chooses another place for this folder."""
        return "run.scratch=…" if self.url else "run.root=…"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the run: two commands that write to one folder would undo each other's work.

        A run in an object store is fetched before, and what is new is published during the block and at its end.

        Raises:
            AtlasError: If another command holds the lock, or if this folder can't be written to.
            TryAgainError: If the store can't be reached.
        """
        with contextlib.ExitStack() as stack:
            try:
                created = self._create()
                stack.enter_context(run_lock.held(self.lock))
                if self._mirror is not None:
                    stack.enter_context(at_work(self._mirror))
            except LockedError as error:
                holder = self._holder_text(error)
                raise AtlasError(
                    f"Another atlas command is at work in {self}{holder}. Wait for it, or stop it."
                ) from error
            except OSError as error:
                raise AtlasError(
                    f"The run can't be locked: {error.strerror or error}. {self.lock} must be writable, so that no "
                    f"second command writes to this run. Choose a folder that is writable: {self._setting}"
                ) from error
            try:
                yield
            finally:
                self._remove_empty(created)

    def _create(self) -> list[Path]:
        """Create the folder; return the folders that were created, the outermost last."""
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        return missing

    def _remove_empty(self, created: Sequence[Path]) -> None:
        """Remove folders that were created for the lock, if a command ended before it wrote anything to them."""
        if created and [path.name for path in self.path.iterdir()] == [self.lock.name]:
            self.lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for path in created:
                    path.rmdir()

    def _holder_text(self, error: LockedError) -> str:
        """Return who holds the lock as text, and how far that command is; empty if nothing is known."""
        updated = self.read_status().get("updated", "")
        progress = f", with progress as of {updated}" if error.since and str(updated) >= error.since else ""
        return f": {error}{progress}" if str(error) else ""

    def is_running(self) -> bool:
        """Return whether a command holds the lock of this run, as far as this machine can tell."""
        if self._mirror is not None and remote_lock.is_held(self._mirror.remote):
            return True
        # Read permission suffices: `atlas status` also works on runs of other users and on read-only file systems.
        return run_lock.is_held(self.lock)

    @property
    def unused(self) -> bool:
        """Whether this folder has no finished work."""
        return next(self.shards.rglob("*.h5"), None) is None and not self.atlas.is_file()

    def check_config(self, tree: Mapping[str, Any], update: bool) -> None:
        """Check that a configuration agrees with the one that the results in this folder were computed with.

        Engine, site and run settings may always differ, because they change no result. A folder without finished work
        accepts every configuration.

        Args:
            tree: The new configuration as plain data.
            update: Accept any configuration: results that it changes are computed again.

        Raises:
            AtlasError: If a setting that changes results differs; the message lists the differences.
        """
        if update or self.unused or not self.config.is_file():
            return
        before, now = (_completed(settings) for settings in (self.read_config(), tree))
        changed = differences(result_settings(before), result_settings(now))
        # Images may have moved: what they are is identified by their paths below it (`manifest.dataset`).
        changed = [line for line in changed if not line.startswith("data.root: ")]
        if changed:
            listed = "\n  ".join(changed)
            raise AtlasError(
                f"{self} was made with another configuration:\n  {listed}\n"
                "Either give the new run another name (run.name=…), or continue this one and compute only what "
                "changed (run.update=true)."
            )

    def planned_channels(self) -> dict[str, list[int]]:
        """Return the planned channels by layer name, read from plan.csv."""
        if not self.plan.is_file():
            return {}
        rows = pd.read_csv(self.plan, dtype=str, keep_default_na=False).to_dict("records")
        return {str(row["layer"]): [int(c) for c in str(row["channel_list"]).split()] for row in rows if row["layer"]}

    def write_failures(self, rows: Sequence[tuple[str, str, str, str]]) -> None:
        """Write failures.csv.

        Args:
            rows: (stage, what, reason, detail) of each failure; the detail may be a traceback.
        """
        with (
            atomic_path(self.failures) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as handle,
        ):
            writer = csv.writer(handle)
            writer.writerow(("stage", "what", "reason", "detail"))
            writer.writerows(rows)

    def write_status(self, **fields: Any) -> None:
        """Write status.json from `fields` and the time of writing."""
        fields["updated"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        temporary = self.status.with_name(f"{self.status.name}.tmp-{os.getpid()}")
        # Written many times per run, hence without fsync; a failure to write it does not stop the run.
        try:
            temporary.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.status)
        except OSError:
            temporary.unlink(missing_ok=True)

    def read_status(self) -> dict[str, Any]:
        """Return the content of status.json; empty if it can't be read."""
        try:
            return json.loads(self.status.read_text())
        except (OSError, ValueError):
            return {}


def result_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that change results, including the seed, as plain data."""
    sections = {name: section for name, section in tree.items() if name not in FREE_SECTIONS}
    if isinstance(sections.get("data"), Mapping):
        sections["data"] = {
            name: value
            for name, value in sections["data"].items()
            if name not in FREE_DATA and not (name in LATER_DATA and value is None)
        }
    return sections | {"run": {"seed": (tree.get("run") or {}).get("seed", 0)}}


def _completed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the defaults of all members, which an older version may not have stored."""
    completed = {**tree, "render": complete_preset(tree.get("render"))}
    if isinstance(tree.get("data"), Mapping):
        completed["data"] = dataclasses.asdict(DataConfig()) | dict(tree["data"])
    if tree.get("also"):
        completed["also"] = {key: complete_preset(preset) for key, preset in tree["also"].items()}
    return completed


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
