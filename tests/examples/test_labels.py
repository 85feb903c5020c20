"""Class names and other text files as editors and libraries write them."""

import json
import re
from pathlib import Path

import pytest
from conftest import compose

from pipeline.core.errors import AtlasError
from pipeline.data.datasets import list_dataset
from pipeline.models.loading import read_labels
from pipeline.planning import unit_selection
from pipeline.site.context import families

NAMES = ("cat", "dog", '猫 <b>&"x"', "réal, with / slash")
BOMS = ("utf-8", "utf-8-sig", "utf-16")


@pytest.mark.parametrize("encoding", BOMS)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "\r\n".join(NAMES) + "\r\n"),
        ("a.json", json.dumps(NAMES, ensure_ascii=False)),
        ("a.JSON", json.dumps({str(i): name for i, name in reversed(list(enumerate(NAMES)))}, ensure_ascii=False)),
        ("b.json", json.dumps({i: [f"n{i}", name] for i, name in enumerate(NAMES)}, ensure_ascii=False)),
        ("c.json", json.dumps([[f"n{i}", name] for i, name in enumerate(NAMES)], ensure_ascii=False)),
        ("d.json", json.dumps({name: i for i, name in enumerate(NAMES)}, ensure_ascii=False)),
    ],
)
def test_labels_of_every_form_and_mark(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_labels(tmp_path / name) == NAMES


def test_class_names_that_are_numbers(tmp_path: Path) -> None:
    """ImageFolder numbers folders in the order of their names: 10 comes before 2."""
    (tmp_path / "a.json").write_text('{"0": 0, "10": 1, "2": 2}')
    assert read_labels(tmp_path / "a.json") == ("0", "10", "2")


@pytest.mark.parametrize(
    ("content", "message", "mended"),
    [
        ('{"cat": 0, "dog": 0}', "the number 0 belongs to 'cat' and to 'dog'", '{"cat": 0, "dog": 1}'),
        ('{"cat": 0, "dog": 2}', "run from 0 to 1: it lacks 1 and has 2", '{"cat": 0, "dog": 1}'),
        ('{"1": "cat", "2": "dog"}', "run from 0 to 1: it lacks 0 and has 2", '{"0": "cat", "1": "dog"}'),
        ('{"cat": -1, "dog": 0}', "it lacks 1 and has -1", '{"cat": 1, "dog": 0}'),
        ('{"0": "cat", "0": "dog"}', "the key '0' occurs twice", '{"0": "cat", "1": "dog"}'),
        ('{"0": "cat", "00": "dog"}', "the number 0 belongs to 'cat' and to 'dog'", '{"0": "cat", "1": "dog"}'),
        ('{"cat": "animal"}', "neither the keys nor the values", '{"cat": 0}'),
        ('{"classes": ["cat", "dog"]}', "neither the keys nor the values", '["cat", "dog"]'),
        ('"cat"', "it holds a str", '["cat"]'),
        ("3", "it holds a int", '["cat"]'),
        ('["cat", null]', "null is not a name", '["cat", "dog"]'),
        ("[]", "holds no names", '["cat"]'),
        ("{}", "holds no names", '{"0": "cat"}'),
        ("", "can't be read", '["cat"]'),
    ],
)
def test_labels_that_say_nothing_clear(tmp_path: Path, content: str, message: str, mended: str) -> None:
    path = tmp_path / "labels.json"
    path.write_text(content)
    with pytest.raises(AtlasError, match=re.escape(message)):
        read_labels(path)
    path.write_text(mended)
    assert read_labels(path)[0] in ("cat", "dog")


def test_an_empty_list_of_names(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeff\n \n".encode())
    with pytest.raises(AtlasError, match=r"holds no names\. Write one name per line"):
        read_labels(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("cat\n")
    assert read_labels(tmp_path / "a.txt") == ("cat",)


def test_another_encoding_is_refused_until_it_is_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("cat\ndoég\n".encode("latin1"))
    with pytest.raises(AtlasError, match=r"a\.txt is not UTF-8 text: line 2 holds the byte 0xe9\. Save it as UTF-8"):
        read_labels(path)
    path.write_text(path.read_text("latin1"), "utf-8")  # as iconv does
    assert read_labels(path) == ("cat", "doég")


# ---- the other files of users


@pytest.mark.parametrize("encoding", BOMS)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "json"])
def test_labels_of_photographs(tmp_path: Path, photo_folder: Path, encoding: str, suffix: str) -> None:
    names = ["label 0/00.png", "label 1/01.png"]
    rows = {name: f"né {i}" for i, name in enumerate(names)}
    separator = "\t" if suffix == "tsv" else ","
    text = json.dumps(rows) if suffix == "json" else "".join(f"{k}{separator}{v}\r\n" for k, v in rows.items())
    path = tmp_path / f"labels.{suffix}"
    path.write_bytes(text.encode(encoding))
    config = compose(["data=folder", f"data.root={photo_folder}", f"data.labels={path}"]).config.data
    found = {photo.source_path: photo.label for photo in list_dataset(config).images}
    assert {name: found[name] for name in names} == rows
    path.write_bytes(text.replace("\\u00e9", "é").encode("latin1"))
    with pytest.raises(AtlasError, match=r"data\.labels=.* is not UTF-8 text"):
        list_dataset(config)


@pytest.mark.parametrize("encoding", BOMS)
def test_tables_of_units_and_families(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "units.csv").write_bytes("layer,channel\r\nstem é,3\r\n".encode(encoding))
    assert unit_selection.read(tmp_path / "units.csv") == [("stem é", 3)]
    (tmp_path / "families.yaml").write_bytes("families:\n- {name: é, units: ['stem:3']}\n".encode(encoding))
    (family,) = families.read_families(tmp_path / "families.yaml", {"stem": frozenset((3,))})
    assert family.name == "é" and family.members[0].in_atlas


def test_tables_and_families_in_another_encoding(tmp_path: Path) -> None:
    for name, read in (
        ("units.csv", unit_selection.read),
        ("families.yaml", lambda path: families.read_families(path, {})),
    ):
        (tmp_path / name).write_bytes("é:3\n".encode("latin1"))
        with pytest.raises(AtlasError, match=r"line 1 holds the byte 0xe9\. Save it as UTF-8"):
            read(tmp_path / name)
