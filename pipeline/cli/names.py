"""`atlas names`: the names of units, in and out."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.cli.overrides import Options
from pipeline.core.atomic_io import write_atomic
from pipeline.core.errors import AtlasError
from pipeline.names import people
from pipeline.names.book import COLUMNS, NameBook, units_of
from pipeline.names.label_names import FALSE_DISCOVERIES
from pipeline.planning.folder import RunFolder
from pipeline.planning.request import Request
from pipeline.runs.runner import COMPLETE
from pipeline.store.reader import check_structure, open_atlas

# File in the folder of a run with the names of all methods, as `atlas export` writes units.csv.
TABLE = "unit_names.csv"

KEYS = ("import", "author", "out", "clip", "words", "text", "image", "other", "count")
FLAGS = ("all", "replace")

# Units that a search prints.
COUNT = 20


def names(request: Request, options: Options) -> int:
    """Add names of a file to names.csv, or write the table of all names."""
    values = options.values
    _check(options)
    folder = request.folder.existing("atlas.h5", "names")
    check_structure(folder.path)
    if "clip" in values:
        return _clip(request, folder, values)
    if "import" in values:
        return _import(folder, Path(values["import"]).expanduser(), values.get("author", ""), options.flags)
    return _export(folder, values.get("out"), "all" in options.flags)


def _check(options: Options) -> None:
    """Refuse options that go with another one that is not there, and those of two commands."""
    given = {*options.values, *options.flags}
    needs = {"author": "import", "replace": "import"} | dict.fromkeys(("words", "text", "image", "other"), "clip")
    for option in sorted(given):
        if option in needs and needs[option] not in given:
            raise AtlasError(f"`atlas names` uses {option} only with {needs[option]}=….")
    works = [option for option in ("import", "words", "text", "image", "other") if option in given]
    if "clip" in given and not works:
        raise AtlasError(
            "`atlas names` with clip=… needs words=FILE, text=…, image=FILE or other=RUN: what to do with it."
        )
    if len(works) > 1 or (works and "all" in given) or (works and works != ["other"] and "out" in given):
        raise AtlasError(
            "`atlas names` does one thing at a time: import=…, words=…, text=…, image=… or other=… with clip=…, or a "
            "table (out=…, --all). Type two commands."
        )
    if "count" in given and works not in (["text"], ["image"]):
        raise AtlasError("`atlas names` uses count only with text=… or image=….")


def _import(folder: RunFolder, source: Path, author: str, flags: frozenset[str]) -> int:
    """Add the names of a file to names.csv of the run."""
    target = folder.path / people.FILE
    if source.absolute() == target.absolute():
        raise AtlasError(f"{source} is the file of the run itself: edit it, and `atlas site` shows the names.")
    with folder.locked():
        with open_atlas(folder.path) as atlas:
            units = units_of(atlas)
        new = people.read_names(source, author, units)
        kept = people.read_names(target) if target.is_file() else []
        merged, added, replaced = people.merge(kept, new, "replace" in flags)
        if added or replaced:
            people.write_names(target, merged)
    same = len(new) - added - replaced
    print(f"{target}: {added:,} names added, {replaced:,} replaced, {same:,} known already; {len(merged):,} in all")
    print("`atlas site` shows them on the pages")
    return COMPLETE


def _export(folder: RunFolder, out: str | None, everything: bool) -> int:
    """Write the table of names, and print how many there are by method."""
    path = Path(out).expanduser() if out else folder.path / TABLE
    if path.absolute() == (folder.path / people.FILE).absolute():
        raise AtlasError(f"out={out!r} is the file of names by people. Choose another one; the default is {TABLE}.")
    with open_atlas(folder.path) as atlas:
        book = NameBook(atlas)
        rows = book.table(everything)
        units = sum(map(len, units_of(atlas).values()))
        absent = len(book.absent())
    write_atomic(path, people.table(COLUMNS, rows))
    method, earned = COLUMNS.index(people.METHOD), COLUMNS.index("earned")
    counts = [
        f"{len({row[0] for row in rows if row[method] == key and row[earned] == 'True'}):,} by {what}"
        for key, what in (("person", "people"), ("labels", "labels"), ("clip", "CLIP-Dissect"))
    ]
    print(f"{path}: {len(rows):,} names; of {units:,} units, named {', '.join(counts)}")
    if absent:
        print(f"{people.FILE} names {absent:,} units that are not in this atlas; the file keeps them")
    return COMPLETE


def _clip(request: Request, folder: RunFolder, values: Mapping[str, str]) -> int:
    """Name the units by a CLIP model, search them, or compare them with those of another run."""
    # PyTorch and transformers are loaded for this only.
    from pipeline.names import clip_search, examine
    from pipeline.names.clip_model import load_clip
    from pipeline.names.embeddings import FOLDER

    count = values.get("count", str(COUNT))
    if not count.isdigit() or not int(count):
        raise AtlasError(f"count={count!r} must be a number from 1.")
    words = examine.read_words(Path(values["words"]).expanduser()) if "words" in values else []
    model = load_clip(values["clip"])
    if words:
        with folder.locked(), open_atlas(folder.path) as atlas:
            found, made = examine.examine(atlas, model, words)
        earned = int(((found.q <= FALSE_DISCOVERIES) & (found.word >= 0)).sum())
        print(f"{folder.path / FOLDER / model.key}: {made:,} crops embedded, {len(words):,} words")
        print(
            f"{earned:,} of {len(found.layer):,} units named; medians: clarity {_median(found.clarity)}, "
            f"polysemanticity {_median(found.polysemanticity)}; redundancy {found.redundancy:.3f}"
        )
        print("`atlas site` shows them on the pages")
        return COMPLETE
    with open_atlas(folder.path) as atlas:
        if "other" in values:
            other = _run_folder(request, values["other"])
            out = (
                Path(values["out"]).expanduser()
                if "out" in values
                else folder.path / f"units_near_{other.path.name}.csv"
            )
            with open_atlas(other.path) as second:
                result = clip_search.compare(atlas, second, model.key)
            write_atomic(out, people.table(clip_search.COMPARED, result.rows))
            print(f"{out}: {len(result.rows):,} units")
            print(f"mean similarity: of {folder} to {other} {result.there:.3f}, back {result.back:.3f}")
            return COMPLETE
        query = values.get("text", "")
        for unit, cosine in clip_search.search(atlas, model, query, values.get("image"), int(count)):
            print(f"{cosine:6.3f}  {unit}")
    return COMPLETE


def _median(values: np.ndarray) -> str:
    """Return the median of the known values as text."""
    known = values[np.isfinite(values)]
    return f"{np.median(known):.3f}" if len(known) else "unknown"


def _run_folder(request: Request, name: str) -> RunFolder:
    """Return the folder of another run: a path, or the name of one beside those of this configuration."""
    path = Path(name).expanduser()
    path = path if path.is_dir() else request.config.root / name
    other = RunFolder(path).existing("atlas.h5", "names")
    check_structure(other.path)
    return other
