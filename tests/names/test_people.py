"""names.csv: what is refused and how it says so, what a spreadsheet gets, and that nothing is lost."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from pipeline import open_atlas
from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.core.units import Unit
from pipeline.names.book import NameBook, earned_words, unit_names
from pipeline.names.people import PersonsName, merge, read_names, write_names
from pipeline.store.shards import safe_name

HEADING = "unit,name,author,confidence,comment\n"
UNITS = {"a": frozenset({0, 1, 2}), "b.c": frozenset({5})}


def read(tmp_path: Path, text: str, **more) -> list[PersonsName]:
    path = tmp_path / "in.csv"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return read_names(path, **more)


def test_columns_in_any_order_and_several_authors(tmp_path: Path) -> None:
    text = '\ufeffAuthor,Name,unit,other\nAda,"curve, ""left""",a:0,x\n\nBob,líne 線,a:0\n,edge,a:1\n'
    found = read(tmp_path, text, author="Cy", units=UNITS)
    assert [(str(one.unit), one.name, one.author, one.confidence) for one in found] == [
        ("a:0", 'curve, "left"', "Ada", None),
        ("a:0", "líne 線", "Bob", None),
        ("a:1", "edge", "Cy", None),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a:0,,Ada,,", "line 2 has no name: write one, or remove the line"),
        ("a:0,x,,,", "line 2 has no author: write who gave the name, or import with author=NAME"),
        ("a0,x,Ada,,", "line 2: 'a0' is not a unit: write layer:channel"),
        ("a:7,x,Ada,,", "line 2: the atlas has no unit a:7. It has 3 of that layer; the nearest is a:2"),
        ("bc:5,x,Ada,,", "line 2: the atlas has no layer 'bc'. Nearest: b.c"),
        ("a:0,x,Ada,80%,", "line 2: confidence='80%' must be a number from 0 to 1, as 0.8"),
        ("a:0,x,Ada,nan,", "line 2: confidence='nan' must be"),
        ("a:0,x,Ada,1.5,", "line 2: confidence='1.5' must be"),
        ('a:0,"x\ny",Ada,,', "line 3: the name holds a line break. Remove it"),
        ("a:0,x\x00y,Ada,,", "the name holds the control character U+0000"),
        ("a:0,x\u202ey,Ada,,", "the name holds the control character U+202E"),
        (f"a:0,{'x' * 10_000},Ada,,", "line 2: the name has 10,000 characters, 200 at most. Shorten it"),
        ("a:0,x,Ada,,,y", "line 2 has 6 cells, the first line 5: put texts with a comma in double quotes"),
        ('a:0,"x"y,Ada,,', "line 2 is not valid CSV"),
        ("a:0,x,Ada,,\na:1,x,Ada,,\na:0,y,Ada,,", "line 4: Ada names a:0 'y' here and 'x' in line 2"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line_and_a_way_out(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(AtlasError) as error:
        read(tmp_path, HEADING + rows + "\n", units=UNITS)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no column 'unit'"), ("unit;name\na:0;x\n", "no column 'unit'"), ("unit,name,unit\n", "'unit' twice")],
)
def test_a_wrong_heading_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AtlasError, match=message):
        read(tmp_path, text)


def test_equal_rows_count_once(tmp_path: Path) -> None:
    assert len(read(tmp_path, HEADING + "a:0,x,Ada,0.5,\n" * 3)) == 1


@pytest.mark.parametrize("text", ["=1+1", "@x", "+x", "-x", " =x", "'=x", "''=x", "'x", "-1", '<b>"&', "𝛼 ́"])
def test_texts_survive_a_spreadsheet_and_are_no_formulas(tmp_path: Path, text: str) -> None:
    path = tmp_path / "names.csv"
    name = PersonsName(Unit("=a", 0), text.strip(), "=Ada", 0.25, f"{text.strip()}\nsecond line")
    write_names(path, [name])
    assert read_names(path) == [name]
    with path.open(newline="") as handle:
        cells = [cell for row in csv.reader(handle) for cell in row]
    assert not any(cell.startswith(("=", "@", "+", "\t")) for cell in cells)


def test_merging_loses_nothing() -> None:
    ada, bob = (PersonsName(Unit("a", 0), "x", author) for author in ("Ada", "Bob"))
    other = PersonsName(Unit("a", 0), "y", "Ada", line=7)
    assert merge([ada], [bob, ada], replace=False) == ([ada, bob], 1, 0)
    with pytest.raises(AtlasError, match=r"Line 7: Ada names a:0 'y'.*--replace"):
        merge([ada, bob], [other], replace=False)
    assert merge([ada, bob], [other], replace=True) == ([other, bob], 0, 1)


def test_names_go_in_and_out_of_a_run(
    finished: Path, tmp_path: Path, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Imported names are on the pages, in titles and the search if earned, and a rerun leaves them alone."""
    with open_atlas(finished) as atlas:
        layer = next(iter(atlas))
        unit, other = (f"{layer.name}:{c}" for c in layer.channels[:2].tolist())
    hostile = "</script><script>alert(1)</script>"
    source = tmp_path / "mine.csv"
    source.write_text(f"unit,name,confidence,comment\n{unit},{hostile},0.9,\n{other},unsure,0.25,a guess\n")
    assert main(["names", str(finished), f"import={source}"]) == 2
    assert "no author" in capsys.readouterr().err and not (finished / "names.csv").exists()
    assert main(["names", str(finished), f"import={source}", "author=Ada"]) == 0
    assert "2 names added" in capsys.readouterr().out
    kept = (finished / "names.csv").read_bytes()
    assert main(["run", *tiny_run]) == 0
    assert (finished / "names.csv").read_bytes() == kept
    site = finished / "site"
    search = (site / "data" / "search.js").read_text()
    assert "alert(1)" in search and "unsure" not in search
    assert not any("<script>alert(1)" in page.read_text(errors="replace") for page in site.rglob("*.html"))
    records = json.loads((site / "api" / "v1" / "units" / f"{safe_name(layer.name)}.json").read_text())["units"]
    assert records[0]["names"][0] == {
        "name": hostile, "author": "Ada", "method": "person", "earned": True, "confidence": 0.9,
    }  # fmt: skip
    assert records[1]["names"][0]["comment"] == "a guess" and not records[1]["names"][0]["earned"]
    # Another author stands beside the first; the same one does not replace a name unasked.
    source.write_text(f"unit,name,author\n{unit},edge,Bob\n{unit},line,Ada\n")
    assert main(["names", str(finished), f"import={source}"]) == 2 and (finished / "names.csv").read_bytes() == kept
    assert main(["names", str(finished), f"import={source}", "--replace"]) == 0
    assert main(["names", str(finished), f"out={tmp_path / 'all.csv'}"]) == 0
    table = unit_names(finished)
    assert table[["name", "author", "method", "earned"]].values.tolist()[:2] == [
        ["line", "Ada", "person", True],
        ["edge", "Bob", "person", True],
    ]
    # The table can be imported into another run; computed names stay behind.
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / "names.csv").unlink()
    assert main(["names", str(copy), f"import={tmp_path / 'all.csv'}"]) == 0
    assert len(read_names(copy / "names.csv")) == 3
    with open_atlas(copy) as atlas:
        names = NameBook(atlas).names(next(iter(atlas)))
    assert earned_words(names[0])[:2] == ["line", "edge"]


def test_names_of_units_that_are_gone_are_kept_and_reported(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "names.csv").write_text("unit,name,author\ngone:1,x,Ada\n")
    assert main(["site", str(finished)]) == 0
    assert "1 units that are not in the atlas, which no page shows: gone:1" in capsys.readouterr().err
    (finished / "names.csv").write_text("unit,name,author\ngone:1,x\n")
    assert main(["site", str(finished)]) == 2
    assert "names.csv, line 2 has no author" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["author=Ada"], "uses author only with import="),
        (["--replace"], "uses replace only with import="),
        (["import=x.csv", "--all"], "Type two commands"),
        (["import=x.csv"], "x.csv can't be read: No such file or directory"),
        (["out={}/names.csv"], "is the file of names by people"),
        (["import={}/names.csv"], "is the file of the run itself"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    finished: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["names", str(finished), *(a.format(finished) for a in arguments)]) == 2
    assert message in capsys.readouterr().err
