"""`names.csv`: names that people, or programs of theirs, gave to units; several authors may name one unit.

The file is in the folder of the run and is never written by anything but `atlas names import=…`, which adds to it.
Spreadsheets execute cells that begin like a formula; such texts are written with an apostrophe in front, and read
without it.
"""

import csv
import dataclasses
import io
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.core.atomic_io import write_atomic
from pipeline.core.config_files import decode_text
from pipeline.core.errors import AtlasError, nearest_names
from pipeline.core.units import Unit

FILE = "names.csv"
COLUMNS = ("unit", "name", "author", "confidence", "comment")

# Column of a table of `atlas names` that says who a name is from; rows by a method of this program are not imported.
METHOD, PERSON = "method", "person"

# Most characters of a text.
LIMITS = {"unit": 500, "name": 200, "author": 100, "comment": 2_000}

# Most bytes of a file of names, far above one for 60,000 units by ten authors.
MAX_BYTES = 500_000_000

# Spreadsheets take a cell that begins with one of these as a formula, some also after spaces.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclasses.dataclass(frozen=True)
class PersonsName:
    """A name of a unit by a person.

    Attributes:
        unit: The unit.
        name: Its name.
        author: Who gave the name.
        confidence: How sure the author is, 0 … 1; None if not stated.
        comment: A comment; may be empty.
        line: Line of the file that it was read from.
    """

    unit: Unit
    name: str
    author: str
    confidence: float | None = None
    comment: str = ""
    line: int = dataclasses.field(default=0, compare=False)


def read_names(path: Path, author: str = "", units: Mapping[str, frozenset[int]] | None = None) -> list[PersonsName]:
    """Read a file of names: CSV with a heading, whose columns `unit` and `name` are necessary.

    Args:
        path: The file.
        author: Author of rows without one.
        units: Channels of the atlas by layer; a unit that is not among them is an error. None allows any.

    Raises:
        AtlasError: With the line and what to write instead, if a row is wrong.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise AtlasError(f"{path} is too large: {path.stat().st_size:,} bytes, {MAX_BYTES:,} at most.")
        text = decode_text(path.read_bytes(), str(path))
    except OSError as error:
        raise AtlasError(f"{path} can't be read: {error.strerror or error}.") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    found: dict[tuple[Unit, str], PersonsName] = {}
    try:
        heading = _heading(next(reader, []), path)
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            where = f"{path}, line {reader.line_num}"
            name = _name(row, heading, author, where, reader.line_num)
            if name is None:
                continue
            if units is not None:
                _check_unit(name.unit, units, where)
            other = found.setdefault((name.unit, name.author), name)
            if other != name:
                raise AtlasError(
                    f"{where}: {name.author} names {name.unit} {name.name[:40]!r} here and {other.name[:40]!r} in line "
                    f"{other.line}. An author gives a unit one name: remove a row, or write another author."
                )
    except csv.Error as error:
        raise AtlasError(
            f"{path}, line {reader.line_num} is not valid CSV: {error}. A text with a comma, a quote or a line break "
            'stands in double quotes, and a quote in it is doubled: "a ""b"", c".'
        ) from None
    return list(found.values())


def _heading(cells: Sequence[str], path: Path) -> dict[str, int]:
    """Return the number of each column."""
    names = [cell.strip().lower() for cell in cells]
    missing = [column for column in COLUMNS[:2] if column not in names]
    if missing:
        found = ", ".join(names)[:100] or "nothing"
        raise AtlasError(
            f"{path}, line 1 has no column {missing[0]!r}. The first line must be {','.join(COLUMNS)}; the last three "
            f"may be left out. It has: {found}."
        )
    twice = [column for column in (*COLUMNS, METHOD) if names.count(column) > 1]
    if twice:
        raise AtlasError(f"{path}, line 1 has the column {twice[0]!r} twice: remove one.")
    return {name: number for number, name in enumerate(names)}


def _name(row: Sequence[str], heading: Mapping[str, int], author: str, where: str, line: int) -> PersonsName | None:
    """Return the name in a row, or None if it is one by a method of this program."""
    if len(row) > len(heading):
        raise AtlasError(
            f"{where} has {len(row)} cells, the first line {len(heading)}: put texts with a comma in double quotes."
        )
    cells = {name: _unmarked(row[number].strip()) if number < len(row) else "" for name, number in heading.items()}
    if cells.get(METHOD, "") not in ("", PERSON):
        return None
    texts = {column: _text(cells.get(column, ""), column, where) for column in LIMITS}
    if not texts["name"]:
        raise AtlasError(f"{where} has no name: write one, or remove the line.")
    try:
        unit = Unit.parse(texts["unit"])
    except AtlasError as error:
        raise AtlasError(f"{where}: {error}") from None
    texts["author"] = texts["author"] or author
    if not texts["author"]:
        raise AtlasError(f"{where} has no author: write who gave the name, or import with author=NAME.")
    confidence = _confidence(cells.get("confidence", ""), where)
    return PersonsName(unit, texts["name"], texts["author"], confidence, texts["comment"], line)


def _text(text: str, column: str, where: str) -> str:
    if len(text) > LIMITS[column]:
        raise AtlasError(f"{where}: the {column} has {len(text):,} characters, {LIMITS[column]:,} at most. Shorten it.")
    for character in text:
        # Marks of direction can make a text look like another one; the joiners of scripts and emoji are texts.
        wrong = (
            unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
            or character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
        )
        if wrong and not (column == "comment" and character in "\n\r\t"):
            what = (
                "a line break" if character in "\n\r\u2028\u2029" else f"the control character U+{ord(character):04X}"
            )
            raise AtlasError(f"{where}: the {column} holds {what}. Remove it.")
    return text


def _confidence(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise AtlasError(f"{where}: confidence={text[:40]!r} must be a number from 0 to 1, as 0.8, or empty.")
    return value


def _check_unit(unit: Unit, units: Mapping[str, frozenset[int]], where: str) -> None:
    if unit.layer not in units:
        raise AtlasError(f"{where}: the atlas has no layer {unit.layer!r}. {nearest_names(unit.layer, units)}")
    if unit.channel not in units[unit.layer]:
        channels = sorted(units[unit.layer])
        near = min(channels, key=lambda channel: abs(channel - unit.channel), default=None)
        hint = "" if near is None else f" It has {len(channels)} of that layer; the nearest is {unit.layer}:{near}."
        raise AtlasError(f"{where}: the atlas has no unit {unit}.{hint}")


def merge(kept: Sequence[PersonsName], new: Sequence[PersonsName], replace: bool) -> tuple[list[PersonsName], int, int]:
    """Add names to those of a file; nothing is lost unless `replace` is true.

    Args:
        kept: The names of the file.
        new: The names to add.
        replace: Whether a name takes the place of another one by its author.

    Returns:
        All names, in the order of the file; the number of names added, and of those replaced.

    Raises:
        AtlasError: If an author has named a unit otherwise, and `replace` is false.
    """
    names = {(name.unit, name.author): name for name in kept}
    added = replaced = 0
    for name in new:
        before = names.get((name.unit, name.author))
        if before is None:
            added += 1
        elif before != name:
            if not replace:
                raise AtlasError(
                    f"Line {name.line}: {name.author} names {name.unit} {name.name[:40]!r}; {FILE} of the run has "
                    f"{before.name[:40]!r} by the same author, or another confidence or comment. Nothing was imported. "
                    "Add --replace to take the new ones."
                )
            replaced += 1
        names[name.unit, name.author] = name
    return list(names.values()), added, replaced


def write_names(path: Path, names: Iterable[PersonsName]) -> None:
    """Write a file of names, atomically."""
    rows = [
        (str(one.unit), one.name, one.author, "" if one.confidence is None else f"{one.confidence:g}", one.comment)
        for one in names
    ]
    write_atomic(path, table(COLUMNS, rows))


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> bytes:
    """Return a table as CSV in UTF-8; cells that a spreadsheet would execute begin with an apostrophe."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heading)
    writer.writerows([_marked(cell) for cell in row] for row in rows)
    return text.getvalue().encode()


def _marked(text: str) -> str:
    # A negative number is no formula.
    begins = text.lstrip(" '").startswith(FORMULA)
    return f"'{text}" if begins and not _is_number(text) else text


def _unmarked(text: str) -> str:
    return text[1:] if text.startswith("'") and text[1:].lstrip(" '").startswith(FORMULA) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
