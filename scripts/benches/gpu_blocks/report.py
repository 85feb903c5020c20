"""The table that is printed last, and what the measurements say about the goals."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

# Goals: minutes of all channels of ResNet-50, and the other limits.
GOAL_MINUTES, DEFAULT_MINUTES = 15.0, 6.0
OF_BARE, OF_LUCENT, IMAGES_A_SECOND, OF_DECODER, OF_ONE_PROCESS = 0.9, 100.0, 1000.0, 0.9, 0.97
LONGEST, LONGEST_GOAL = 9_700, 230  # characters of the table, and of the line of a goal
LONGEST_CELL = 44
STATES = ("started", "done", "failed", "killed", "skipped")


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One goal: True if it is met, None if it was not measured."""

    name: str
    met: bool | None
    found: str

    def line(self, judged: bool) -> str:
        verdict = "NOT MEASURED" if self.met is None else "PASS" if self.met else "FAIL"
        if not judged and self.met is not None:
            verdict = "DRY RUN"
        return f"{verdict:<12} {self.name}: {self.found}"


def of(rows: Sequence[Row], what: str, **values: Any) -> list[Row]:
    """Return the rows of a kind with these values."""
    return [row for row in rows if row["what"] == what and all(row.get(k) == v for k, v in values.items())]


def correctness(rows: Sequence[Row]) -> Criterion:
    judged = [row for row in rows if row["block"] == "correctness" and row.get("ok") is not None]
    wrong = [row for row in judged if not row["ok"]]
    names = "; ".join(
        f"{row['what']} {row.get('layer', '')} {row.get('precision', '')}: {row['value']}" for row in wrong
    )
    complete = any(row["block"] == "correctness" and row["what"] == "done" for row in rows)
    met = (not wrong and complete) if judged and (wrong or complete) else None
    found = f"{len(judged) - len(wrong)} of {len(judged)} comparisons within their limits" + (
        f" ({names})" if wrong else ""
    )
    return Criterion("correctness", met, found[:400])


def atlas(rows: Sequence[Row], canvas: str, name: str, limit: float) -> Criterion:
    key = "with starts and evaluation min"
    found = min(of(rows, "all channels", canvas=canvas), key=lambda row: row[key], default=None)
    if found is None:
        return Criterion(name, None, "")
    said = f"{found[key]:.1f} min, steps alone {found['loop min']:.1f}, in {found['precision']}; at most {limit:.0f}"
    return Criterion(name, found[key] <= limit, said)


def goal_atlas(rows: Sequence[Row]) -> Criterion:
    return atlas(rows, "224 px", "ResNet-50, 26,560 channels, 224 px × 256 steps", GOAL_MINUTES)


def default_atlas(rows: Sequence[Row]) -> Criterion:
    return atlas(rows, "own canvas", "ResNet-50, 26,560 channels, default preset", DEFAULT_MINUTES)


def bare(rows: Sequence[Row]) -> Criterion:
    found = min(of(rows, "layer"), key=lambda row: row["of bare"], default=None)
    name = f"at least {OF_BARE:.0%} of the bare loop in the same precision"
    if found is None:
        return Criterion(name, None, "")
    place = f"{found['layer']}, {found['px']} px, {found['precision']}"
    all_layers = ", ".join(
        f"{row['of bare']:.2f} {row['canvas']} {row['precision']}" for row in of(rows, "all channels")
    )
    said = f"least {found['of bare']:.2f} ({place}); of the whole atlas {all_layers or 'not known'}"
    return Criterion(name, found["of bare"] >= OF_BARE, said)


def lucent(rows: Sequence[Row]) -> Criterion:
    key, name = "times faster a channel", f"at least {OF_LUCENT:.0f} × Lucent a channel"
    found = min(of(rows, "against Lucent"), key=lambda row: row[key], default=None)
    if found is None:
        return Criterion(name, None, "")
    batched = found["times faster than its best batched loop a channel"]
    return Criterion(name, found[key] >= OF_LUCENT, f"{found[key]:.0f} × ({batched:.0f} × its best batched loop)")


def dataset(rows: Sequence[Row]) -> Criterion:
    name = f"dataset pass: {IMAGES_A_SECOND:,.0f} images/s, or {OF_DECODER:.0%} of the decoder's rate"
    whole, alone = of(rows, "whole first pass"), of(rows, "decoding alone")
    if not whole or not alone:
        return Criterion(name, None, "")
    rate, limit = max(row["images/s"] for row in whole), alone[0]["images/s"]
    met = rate >= min(IMAGES_A_SECOND, OF_DECODER * limit)
    return Criterion(name, met, f"{rate:,.0f} images/s; decoding alone {limit:,.0f}")


def processes(rows: Sequence[Row]) -> Criterion:
    found = of(rows, "processes", processes=2)
    name = "two processes never slower than one"
    if not found:
        return Criterion(name, None, "")
    least = min(row["of one process"] for row in found)
    return Criterion(name, least >= OF_ONE_PROCESS, f"least ratio {least:.2f}")


def memory(rows: Sequence[Row]) -> Criterion:
    name = "nothing lost when memory runs out"
    found = of(rows, "out of memory")
    if not found:
        return Criterion(name, None, "")
    row = found[0]
    said = f"{row['images']} of {row['asked']} images, in batches of {row['fits']}"
    return Criterion(name, (row["ok"] and row["halved"]) if row["halved"] or not row["ok"] else None, said)


def tests(rows: Sequence[Row]) -> Criterion:
    found = of(rows, "pytest -m gpu")
    return Criterion("pytest -m gpu", found[0]["ok"] if found else None, str(found[0]["said"]) if found else "")


def criteria(rows: Sequence[Row]) -> list[Criterion]:
    """Return what the rows say about each goal."""
    found = []
    for goal in (correctness, goal_atlas, default_atlas, bare, lucent, dataset, processes, memory, tests):
        try:
            found.append(goal(rows))
        except Exception as error:  # an odd row must not cost the table
            found.append(Criterion(goal.__name__, None, f"{type(error).__name__}: {error}"))
    return found


def shown(value: Any) -> str:
    """Return a value as a cell of the table."""
    if value is None or value == "" or value == []:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
    return str(value)[:LONGEST_CELL]


def worst(rows: Sequence[Row]) -> list[Row]:
    """Return one row for all comparisons of the same kind and precision: that closest to its limit."""
    groups: dict[tuple[Any, Any], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["what"], row.get("precision")), []).append(row)
    return [
        {**max(group, key=lambda row: float(row["value"]) / row["limit"]), "comparisons": len(group)}
        for group in groups.values()
    ]


def lines_of(block: str, rows: Sequence[Row]) -> list[str]:
    """Return the lines of one block: a header and the rows of each kind."""
    state = next((row for row in reversed(rows) if row["what"] in STATES), {"what": "skipped"})
    took = f", {state['seconds']:.0f} s" if "seconds" in state else ""
    lines = [f"== {block}: {state['what']}{took}" + (f": {state['reason']}" if state.get("reason") else "")]
    plain = [row for row in rows if row["what"] not in STATES]
    judged = [row for row in plain if "limit" in row]
    groups: dict[str, list[Row]] = {"": worst(judged)} if judged else {}
    for row in plain:
        if "limit" not in row:
            groups.setdefault(row["what"], []).append(row)
    for what, group in groups.items():
        columns = [key for key in dict.fromkeys(k for row in group for k in row) if key not in ("block", "what")]
        columns = [key for key in columns if any(shown(row.get(key)) for row in group)]
        columns = (["what"] if not what else []) + columns
        lines.append((f"{what}: " if what else "") + " | ".join(columns))
        lines += ["  " + " | ".join(shown(row.get(key)) for key in columns) for row in group]
    return lines


def table(rows: Sequence[Row], blocks: Sequence[str], judged: bool) -> str:
    """Return everything that is printed last: the blocks, then the goals; at most 12,000 characters."""
    parts = [lines_of(block, own) for block in blocks if (own := [row for row in rows if row["block"] == block])]
    left_out = 0
    while sum(len(line) + 1 for part in parts for line in part) > LONGEST:
        del max(parts, key=lambda part: sum(map(len, part)))[-1]
        left_out += 1
    if left_out:
        parts.append([f"… {left_out} more rows of the longest blocks are in gpu.jsonl"])
    text = "\n".join(line for part in parts for line in part)
    goals = "\n".join(criterion.line(judged)[:LONGEST_GOAL] for criterion in criteria(rows))
    return f"{text}\n\n{goals}"
