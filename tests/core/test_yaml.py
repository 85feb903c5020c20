"""YAML files of the user and of run folders: what is no YAML is told, and what would fill the memory is refused."""

import time
from pathlib import Path

import pytest

from pipeline.cli.main import main
from pipeline.core.config_files import load_yaml
from pipeline.core.errors import AtlasError
from pipeline.planning.folder import RunFolder
from pipeline.site.context.families import read_families

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


def test_aliases_are_kept_and_bombs_of_them_refused() -> None:
    assert load_yaml("a: &x [1, 2]\nb: *x", "file") == {"a": [1, 2], "b": [1, 2]}
    began = time.monotonic()
    for text in (BOMB, "&a [*a]"):
        with pytest.raises(AtlasError, match="file stands for more than 1,000,000 values, by its aliases"):
            load_yaml(text, "file")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("text", ["a: [", "[" * 5000, "a: b: c", "- \x00"])
def test_what_is_no_yaml_is_told(text: str) -> None:
    with pytest.raises(AtlasError, match="file is not valid YAML"):
        load_yaml(text, "file")


def test_families_are_read_within_the_limits(tmp_path: Path) -> None:
    (tmp_path / "families.yaml").write_text(BOMB)
    with pytest.raises(AtlasError, match=r"families\.yaml stands for more than"):
        read_families(tmp_path / "families.yaml", {})


def test_a_torn_config_is_told_before_any_work(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny" / "shards").mkdir(parents=True)
    (tmp_path / "tiny" / "shards" / "1.h5").touch()
    (tmp_path / "tiny" / "config.yaml").write_text("model: {name: [")
    for command in (["run", *tiny_run], ["plan", *tiny_run]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "config.yaml is not valid YAML" in told and "run.update=true writes it again" in told
    assert main(["verify", str(tmp_path / "tiny")]) == 1
    assert "config.yaml" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_to_is_told_before_any_work(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["run", *tiny_run, f"run.root={tmp_path}/file/runs"]) == 2
    assert "file can't be written to" in capsys.readouterr().err
    RunFolder(tmp_path / "new" / "run").check_writable()
    assert not (tmp_path / "new").exists()
