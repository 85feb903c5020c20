"""The rows of results in gpu.jsonl; imports nothing but the standard library."""

import contextlib
import json
from pathlib import Path
from typing import Any


def append(out: Path, row: dict[str, Any]) -> None:
    """Append a row to gpu.jsonl at once: what is there stays there, whatever happens to the process."""
    with (out / "gpu.jsonl").open("a") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return all complete rows of gpu.jsonl."""
    path, rows = out / "gpu.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows
