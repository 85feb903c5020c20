"""Names by a CLIP model from the command line to the pages."""

import json
import shutil
from pathlib import Path

import h5py
import jsonschema
import numpy as np
import pytest
from tiny_clip import COLORS, WORDS, colored, write_color_atlas

from pipeline import open_atlas
from pipeline.cli.main import main
from pipeline.names.clip_model import ClipModel
from pipeline.names.clip_search import compare, search
from pipeline.names.examine import examine
from pipeline.site.build import build_site
from pipeline.site.config import SiteConfig
from pipeline.site.data import api
from pipeline.store.shards import safe_name

pytest.importorskip("transformers")


def shard(path: Path):
    text = path.read_text()
    return json.loads(text[text.index(",") + 1 : text.rindex(")")])


def test_words_scores_and_neighbours_are_on_the_site(tmp_path: Path, clip: ClipModel) -> None:
    path = write_color_atlas(tmp_path / "atlas.h5", mixed=6)
    site, config = tmp_path / "site", SiteConfig(example_px=32, photo_px=32, thumb_px=32, cards="none", workers=1)
    with open_atlas(path) as atlas:
        build_site(atlas, site, config)
        assert not (site / "data" / "concepts.js").exists()
        first = shard(site / "data" / "index.js")["words"]
        examine(atlas, clip, [*WORDS, "</script><img src=x>"])
    with open_atlas(path) as atlas:
        build_site(atlas, site, config)
    index, search_words = shard(site / "data" / "index.js"), shard(site / "data" / "search.js")
    # Browsers fetch the words again when they have changed.
    assert index["words"] != first and index["concepts"]
    named = [search_words["words"][i] if i >= 0 else "" for i in search_words["units"][0]]
    assert named == [*COLORS, *[""] * 6]
    concepts = shard(site / "data" / "concepts.js")
    found = {word: units[:3] for word, units in zip(concepts["words"], concepts["units"], strict=True) if units}
    # Of twelve units, not the unit of every color stands out.
    assert len(found) >= 3
    for word, (layer, row, cosine) in found.items():
        assert layer == 0 and list(COLORS)[row] == word and 300 < cosine <= 1000
    assert "<img" not in (site / "data" / "concepts.js").read_text()
    layer = json.loads((site / "api" / "v1" / "units" / "late.json").read_text())
    jsonschema.validate(layer, api.schema())
    unit = layer["units"][0]
    assert unit["names"][0]["method"] == "clip" and unit["names"][0]["author"] == "CLIP-Dissect, tiny-clip"
    assert unit["meanings"][0]["clarity"] > 0.8 and unit["meanings"][0]["similar"][0] == "late"
    assert "names" not in layer["units"][-1]


def test_search_and_comparison(tmp_path: Path, clip: ClipModel) -> None:
    for name, order in (("a", tuple(COLORS)), ("b", tuple(reversed(COLORS)))):
        (tmp_path / name).mkdir()
        with open_atlas(write_color_atlas(tmp_path / name / "atlas.h5", order, mixed=0)) as atlas:
            examine(atlas, clip, WORDS)
    colored("blue", 77).save(tmp_path / "blue.png")
    with open_atlas(tmp_path / "a") as first, open_atlas(tmp_path / "b") as second:
        blue = list(COLORS).index("blue")
        assert search(first, clip, "blue", count=2)[0][0] == ("late", blue)
        assert search(first, clip, image=str(tmp_path / "blue.png"), count=2)[0][0] == ("late", blue)
        found = compare(first, second, clip.key)
        assert {row[0]: row[1] for row in found.rows} == {f"late:{i}": f"late:{5 - i}" for i in range(6)}
        assert (
            all(row[3] == "yes" for row in found.rows)
            and found.there == pytest.approx(found.back)
            and found.there > 0.9
        )


@pytest.mark.long
def test_the_command_line(
    finished: Path, clip_folder: Path, tmp_path: Path, tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Embeddings survive a rerun and are not made twice; a run without them says how to make them."""
    words = tmp_path / "words.txt"
    words.write_text("\n".join(WORDS))
    run, clip = str(finished), f"clip={clip_folder}"
    assert main(["names", run, clip, "text=red"]) == 2
    assert "words=FILE" in capsys.readouterr().err
    assert main(["names", run, clip, f"words={words}"]) == 0
    said = capsys.readouterr().out
    assert " crops embedded, 6 words" in said and "of 15 units named" in said and " 0 crops embedded" not in said
    assert main(["run", *tiny_run]) == 0
    records = json.loads((finished / "site" / "api" / "v1" / "units" / f"{safe_name('conv_head')}.json").read_text())
    assert records["units"][0]["meanings"][0]["model"] == "tiny-clip"
    assert main(["names", run, clip, f"words={words}"]) == 0
    assert ": 0 crops embedded" in capsys.readouterr().out
    assert main(["names", run, clip, "text=red", "count=3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    copy = shutil.copytree(finished, tmp_path / "copy")
    assert main(["names", run, clip, f"other={copy}", f"out={tmp_path / 'near.csv'}"]) == 0
    assert "mean similarity: of" in capsys.readouterr().out
    lines = (tmp_path / "near.csv").read_text().splitlines()
    assert lines[0] == "unit,nearest,similarity,mutual" and len(lines) == 16
    assert main(["names", run, "--all"]) == 0
    assert ",clip," in (finished / "unit_names.csv").read_text()
    assert main(["verify", run]) == 0 and main(["compact", run]) == 0
    assert main(["names", run, clip, f"words={words}"]) == 0 and ": 0 crops embedded" in capsys.readouterr().out
    units = next((finished / "names").glob("clip-*/units.npz"))
    units.write_bytes(units.read_bytes()[:200])
    assert main(["site", run]) == 2 and "units.npz is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["words=w.txt"], "uses words only with clip="),
        (["clip=x"], "needs words=FILE, text=…, image=FILE or other=RUN"),
        (["clip=x", "text=a", "image=b"], "one thing at a time"),
        (["clip=x", "words=none.txt"], "words='none.txt' can't be read"),
        (["clip=x", "text=a"], "clip='x' is neither a folder nor an installed package"),
        (["clip=x", "text=a", "count=0"], "count='0' must be a number from 1"),
        (["count=3"], "uses count only with text="),
    ],
)
def test_options_that_do_not_fit_are_refused(
    finished: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["names", str(finished), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_query_that_is_no_image(tmp_path: Path, clip: ClipModel, capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.core.errors import AtlasError

    with open_atlas(write_color_atlas(tmp_path / "atlas.h5")) as atlas:
        for text, image, message in (("", str(tmp_path / "atlas.h5"), "can't be read"), (" ", None, "is empty")):
            with pytest.raises(AtlasError, match=message):
                search(atlas, clip, text, image)


def test_crops_of_an_atlas_that_stores_only_crops(tmp_path: Path, clip: ClipModel) -> None:
    """Crops are read where whole images are not stored."""
    path = write_color_atlas(tmp_path / "atlas.h5", mixed=0)
    with h5py.File(path, "r+") as file:
        layer, index = file["layers/late"], file["layers/late/examples/max/index"][:]
        offsets, data = file["dataset/shown/offset"][:], file["dataset/shown/jpeg"][:]
        jpegs = [data[offsets[i] : offsets[i + 1]] for i in index.ravel()]
        lengths = [0, *map(len, jpegs)]
        layer["examples/maps/jpeg"] = np.concatenate(jpegs)
        layer["examples/maps/offset"] = np.cumsum(lengths)
        layer["examples/max/map"] = np.arange(index.size, dtype="int32").reshape(index.shape)
        del file["dataset/shown/jpeg"]
        file["dataset/shown"].attrs["store"] = "crops"
    with open_atlas(path) as atlas:
        names, made = examine(atlas, clip, WORDS)
    assert made > 0 and [names.words[i] for i in names.word.tolist()] == list(COLORS)
