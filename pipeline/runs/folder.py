"""A run's folder: its configuration, lock, status, failures, and where everything else in it lies."""

import contextlib
import csv
import datetime
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from pipeline.config.schema import FREE, differences
from pipeline.core.errors import AtlasError
from pipeline.store.shards import making


class RunFolder:
    """`runs/<name>/`: config.yaml, plan.csv, shards/, atlas.h5, failures.csv, status.json, site/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.plan = path / "plan.csv"
        self.shards = path / "shards"
        self.atlas = path / "atlas.h5"
        self.failures = path / "failures.csv"
        self.status = path / "status.json"
        self.site = path / "site"

    def existing(self) -> "RunFolder":
        """Itself, if there is such a run; else an `AtlasError` that lists those there are."""
        if not self.config.is_file():
            runs = sorted(p.parent.name for p in self.path.parent.glob("*/config.yaml"))
            hint = f"Runs in {self.path.parent}: {', '.join(runs)}." if runs else "`atlas run` makes one."
            raise AtlasError(f"There is no run at {self.path}. {hint}")
        return self

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run: two drivers in one folder would undo each other's work."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise AtlasError(
                    f"Another atlas command is at work in {self.path}. Wait for it, or stop it."
                ) from error
            yield

    def at_work(self) -> bool:
        """Whether some command holds this run now, as far as this machine can see."""
        with contextlib.suppress(OSError), (self.path / ".lock").open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def check(self, tree: Mapping[str, Any], update: bool) -> None:
        """Refuse a configuration other than the one this folder was made with.

        Engine, site and run settings may always differ: they change no result. A folder without any finished
        work, one that was only planned, binds nobody.
        """
        unused = next(self.shards.rglob("*.h5"), None) is None and not self.atlas.is_file()
        if update or unused or not self.config.is_file():
            return
        changed = differences(binding(yaml.safe_load(self.config.read_text())), binding(tree))
        if changed:
            listed = "\n  ".join(changed)
            raise AtlasError(
                f"{self.path} was made with another configuration:\n  {listed}\n"
                "Either give the new one a name of its own (run.name=…), or let this run continue and make only "
                "what changed (run.update=true)."
            )

    def planned(self) -> dict[str, list[int]]:
        """Channels by layer name, from plan.csv."""
        if not self.plan.is_file():
            return {}
        rows = pd.read_csv(self.plan, dtype=str, keep_default_na=False).to_dict("records")
        return {str(row["layer"]): [int(c) for c in str(row["channel_list"]).split()] for row in rows if row["layer"]}

    def write_failures(self, rows: Sequence[tuple[str, str, str, str]]) -> None:
        """failures.csv: stage, what, reason and detail (a traceback, say) of everything that went wrong."""
        with (
            making(self.failures) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as handle,
        ):
            writer = csv.writer(handle)
            writer.writerow(("stage", "what", "reason", "detail"))
            writer.writerows(rows)

    def write_status(self, **fields: Any) -> None:
        """status.json, for `atlas status` and for people who watch."""
        fields["updated"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        temporary = self.status.with_name(f"{self.status.name}.tmp-{os.getpid()}")
        try:  # many times a run, so without fsync; and that nobody can read it now is no reason to stop
            temporary.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.status)
        except OSError:
            temporary.unlink(missing_ok=True)

    def read_status(self) -> dict[str, Any]:
        """The last status, or an empty one."""
        try:
            return json.loads(self.status.read_text())
        except (OSError, ValueError):
            return {}


def binding(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that bind a run folder: those that change results, and the seed."""
    kept = {k: v for k, v in tree.items() if k not in FREE}
    return kept | {"run": {"seed": (tree.get("run") or {}).get("seed", 0)}}


def write_text(path: Path, text: str) -> None:
    """Replace a text file whole."""
    with making(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
