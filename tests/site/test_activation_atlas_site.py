"""The pages of activation atlases: files, data, and links to them only where there is one."""

import json
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from test_site import LABELS, Page, build, write_atlas

from pipeline.activation_atlas.layout import lay_out
from pipeline.activation_atlas.results import AtlasResult, SamplesPart
from pipeline.site.config import SiteConfig
from pipeline.site.data import activation_atlas
from pipeline.store.activation_atlas import write_activation_atlas
from pipeline.store.reader import open_atlas

LAYER = "blocks.1.conv"


def write_made_atlas(path: Path, images: int = 6) -> None:
    """Add an activation atlas of made samples to a layer: of nine kinds, with the first three classes."""
    count = 36
    rng = np.random.default_rng(0)
    vectors = rng.normal(0, 0.05, (count, 1, 9)).astype(np.float32)
    vectors[np.arange(count), 0, np.arange(count) % 9] += 1
    index = np.arange(count, dtype=np.int32) % images
    top = (np.arange(count) % 3).astype(np.int32)
    part = SamplesPart(index, top, (vectors,), (np.zeros((count, 1, 2), np.int16),))
    layout = lay_out(part, 0, 6, 1)
    cells = np.broadcast_to(np.linspace(0, 255, layout.cells)[:, None, None, None], (layout.cells, 40, 40, 3))
    failed = np.arange(layout.cells) == 1
    result = AtlasResult(layout, cells.astype(np.uint8), np.ones(layout.cells, np.float32), failed, "cpu")
    with h5py.File(path, "r+") as file:
        layer = file[f"layers/{LAYER}"]
        assert isinstance(layer, h5py.Group)
        write_activation_atlas(layer, result)


def record_of(site: Path) -> dict:
    text = (site / f"data/activation-atlas/{LAYER}.js").read_text()
    return json.loads(text[text.index(",") + 1 : text.rindex(")")])


def test_the_page_of_an_activation_atlas(tmp_path: Path) -> None:
    path = write_atlas(tmp_path / "atlas.h5")
    build(path)
    assert not (tmp_path / "site/activation-atlas").exists()
    assert "ctivation atlas" not in (tmp_path / "site/index.html").read_text()
    write_made_atlas(path)
    build(path)
    site = tmp_path / "site"
    record = record_of(site)
    with open_atlas(path) as atlas:
        found = atlas[LAYER].activation_atlas()
    assert found is not None and record["grid"] == list(found.grid)
    assert [cell["count"] for cell in record["cells"]] == found.count.tolist()
    assert sum(count for cell in record["cells"] for _, count in cell["classes"]) == 36
    assert record["classes"] == {str(i): LABELS[i] for i in range(3)}
    assert [cell["failed"] for cell in record["cells"]].index(True) == 1
    # A cell of the sheet is the visualization.
    per, columns = record["sheet"]
    sheet = Image.open(site / f"media/activation-atlas/{LAYER}/s0.webp")
    assert sheet.size == (columns * 40, -(-min(per, len(found.count)) // columns) * 40)
    levels = [sheet.getpixel((i % columns * 40 + 20, i // columns * 40 + 20)) for i in range(len(found.count))]
    assert np.abs(np.array(levels)[:, 0] - found.images[:, 20, 20, 0].astype(int)).max() < 12
    for page in ("index.html", f"layers/{LAYER}.html"):
        links = [attributes.get("href") for tag, attributes in Page(site / page).elements if tag == "a"]
        assert any(link and link.endswith(f"activation-atlas/{LAYER}.html") for link in links), page
    others = [page for page in (site / "layers").glob("*.html") if page.stem != LAYER]
    assert others and not any("activation-atlas/" in page.read_text() for page in others)
    assert "activation-atlas" in (site / "method.html").read_text()
    files = [file for kind in ("", "data", "media") for file in (site / kind / "activation-atlas").rglob("*")]
    assert sum(file.is_file() for file in files) <= activation_atlas.files_for(len(found.count))


def test_dataset_images_are_shown_as_the_licence_says(tmp_path: Path) -> None:
    path = write_atlas(tmp_path / "atlas.h5")
    write_made_atlas(path)
    build(path)
    shown = [crop for cell in record_of(tmp_path / "site")["cells"] for _, _, crop in cell["nearest"]]
    assert any(shown) and list((tmp_path / f"site/media/activation-atlas/{LAYER}").glob("n*"))
    build(path, tmp_path / "ids", SiteConfig(licence="ids"))
    hidden = record_of(tmp_path / "ids")["cells"]
    assert not any(crop for cell in hidden for _, _, crop in cell["nearest"]) and hidden[0]["nearest"][0][0]
    assert not list((tmp_path / f"ids/media/activation-atlas/{LAYER}").glob("n*"))


def test_the_same_atlas_gives_the_same_files(tmp_path: Path) -> None:
    path = write_atlas(tmp_path / "atlas.h5")
    write_made_atlas(path)
    contents = []
    for name in ("one", "two"):
        build(path, tmp_path / name)
        found = sorted((tmp_path / name).rglob("*activation-atlas*/**/*"))
        contents.append({file.relative_to(tmp_path / name): file.read_bytes() for file in found if file.is_file()})
    assert contents[0] == contents[1] and len(contents[0]) > 4
