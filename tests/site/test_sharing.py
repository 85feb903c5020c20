"""What is shared of a site: addresses of units, preview images, sitemap, citation, download, and the home page."""

import dataclasses
import io
import json
import urllib.parse
import xml.etree.ElementTree
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from test_site import LABELS, LAYERS, SMALL, Page, build, contents, layer_page, pages_of, write_atlas

from pipeline.core.errors import AtlasError
from pipeline.site.context import unit_text, wall
from pipeline.site.context.layer_summary import Catalogue, summarize
from pipeline.site.data import links
from pipeline.site.hosting.hosts import missing_addresses
from pipeline.site.layout import diagram, stages
from pipeline.site.media import cards
from pipeline.site.sharing import Extent
from pipeline.store.hdf5 import write_array
from pipeline.store.reader import NetworkLayer, open_atlas
from pipeline.store.shards import safe_name

URL = "https://example.org/an-atlas"
ALL = dataclasses.replace(SMALL, cards="all", url=URL, author="Ada Lovelace & Charles Babbage", title="Atlas_1")


def attributes(page: Page, key: str) -> dict[str, str]:
    """Contents of the meta elements of a page, by their `name` or `property`."""
    return {str(meta[key]): str(meta["content"]) for meta in page.all("meta") if meta.get(key)}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A site with an address and a card for each unit."""
    path = write_atlas(tmp_path_factory.mktemp("shared") / "atlas.h5")
    build(path, config=ALL)
    return path.parent / "site"


def local(site: Path, address: str) -> Path:
    assert address.startswith(URL + "/")
    return site / urllib.parse.unquote(address.removeprefix(URL + "/"))


def test_each_unit_has_a_page_with_title_image_and_sentence(shared):
    for name, _, _, channels, *_ in LAYERS:
        for channel in channels:
            page = Page(shared / "u" / safe_name(name) / f"{channel}.html")
            graph, plain = attributes(page, "property"), attributes(page, "name")
            assert graph["og:title"].startswith(f"{name}:{channel}") and graph["og:title"].endswith("tiny")
            assert graph["og:description"] == plain["description"] == plain["twitter:description"]
            assert plain["twitter:card"] == "summary_large_image" and graph["og:site_name"] == "Atlas_1"
            canonical = next(a["href"] for a in page.all("link") if a.get("rel") == "canonical")
            assert canonical == graph["og:url"] and local(shared, str(canonical)) == page.path
            assert graph["og:image"] == plain["twitter:image"]
            with Image.open(local(shared, graph["og:image"])) as card:
                assert (card.size, card.format) == ((1200, 630), "JPEG")
            full = next(a["href"] for a in page.all("a") if a.get("id") == "full")
            assert urllib.parse.unquote(str(full)) == f"../../unit.html#{name}:{channel}"


def test_the_sentence_has_the_numbers_of_the_store(shared):
    with open_atlas(shared.parent) as atlas:
        catalogue, layer = Catalogue.of(atlas), atlas["blocks.0.conv"]
        texts = unit_text.unit_texts(layer, summarize(layer, 1, ()), catalogue, "Net")
        ratios = layer.measurements("distill")["peak_ratio"][:, 0]
    assert texts[1].finding == "the visualization failed"  # the second unit
    told = texts[0].sentence.split(" · ")
    assert told[:2] == ["blocks.0.conv:0", "Net"] and told[2].startswith("maximum activation ")
    assert float(told[2].split()[2].replace("−", "-")) == pytest.approx(float(ratios[0]), rel=0.01)
    # Numbers that are not known are not told.
    with open_atlas(shared.parent) as atlas:
        layer = atlas["stem"]
        assert "nan" not in " ".join(
            text.sentence for text in unit_text.unit_texts(layer, summarize(layer, 0, ()), catalogue, "")
        )


def test_structured_data_describe_the_unit(shared):
    page = (shared / "u/head/2.html").read_text()
    assert "<img src=x" not in page  # the class of this unit is such an element
    data = json.loads(page.split('<script type="application/ld+json">')[1].split("</script>")[0])
    assert data["name"] == f"head:2 ({LABELS[2]}) · tiny" and data["url"] == f"{URL}/u/head/2.html"
    assert data["isPartOf"] == {"@type": "Dataset", "name": "Atlas_1: tiny", "url": f"{URL}/"}
    assert data["creator"]["name"] == ALL.author and data["image"] == f"{URL}/cards/head/2.jpg"


def test_every_page_has_a_description_an_address_and_a_card(shared):
    titles = {}
    for path, page in pages_of(shared).items():
        if path.name == "404.html" or "u" in path.relative_to(shared.resolve()).parts:
            continue
        graph, plain = attributes(page, "property"), attributes(page, "name")
        assert plain["description"] and plain["theme-color"]
        address = next(str(a["href"]) for a in page.all("link") if a.get("rel") == "canonical")
        assert address == graph["og:url"]
        assert local(shared, address).resolve() in (path, path.parent)
        assert local(shared, graph["og:image"]).is_file()
        titles[path.name] = graph["og:title"]
    assert titles["stem.html"] == "stem · Atlas_1" and titles["index.html"] == "Atlas_1: tiny"
    assert attributes(layer_page(shared, "stem"), "property")["og:image"] == f"{URL}/cards/stem/layer.jpg"


def test_the_sitemap_lists_all_pages(shared):
    tree = xml.etree.ElementTree.parse(shared / "sitemap.xml")
    space = "{http://www.sitemaps.org/schemas/sitemap/0.9}"
    found = [str(entry.findtext(f"{space}loc")) for entry in tree.getroot()]
    listed = {local(shared, address).resolve() for address in found}
    unlisted = {"404.html", "unit.html", "pinned.html", "embed.html", "circuit.html"}
    assert listed == {path for path in pages_of(shared) if path.name not in unlisted}
    assert len(found) == len(listed) and {entry.findtext(f"{space}lastmod") for entry in tree.getroot()} == {
        "2026-01-02"
    }


def test_addresses_of_the_api_lead_to_the_images(shared):
    with open_atlas(shared.parent) as atlas:
        for name in ("blocks.1.conv", "../../x"):
            units = json.loads((shared / f"api/v1/units/{safe_name(name)}.json").read_text())["units"]
            for row, unit in enumerate(units):
                assert (shared / unit["page"]).is_file() and (shared / unit["card"]).is_file()
                for key, images in unit["images"].items():
                    stored = atlas[name].images(key)[row]
                    with Image.open(shared / images["file"]) as sheet:
                        for variant, (left, top, width, height) in enumerate(images["boxes"]):
                            cell = np.asarray(sheet.crop((left, top, left + width, top + height)), float)
                            pixels = stored[variant, 0, 0].astype(float)  # the images are of one color
                            assert np.abs(cell.mean((0, 1)) - pixels).max() < 6


def test_cards_show_the_visualization_and_examples(shared):
    with open_atlas(shared.parent) as atlas:
        color = atlas["blocks.0.conv"].images("distill")[2, 0, 0, 0].astype(float)
    with Image.open(shared / "cards/blocks.0.conv/4.jpg") as card:
        pixels = np.asarray(card, float)
    assert np.abs(pixels[100:500, 100:500].mean((0, 1)) - color).max() < 6
    assert pixels[250:580, 640:980].std() > 20  # examples


@pytest.mark.parametrize("licence", ["full", "crop", "blur", "ids"])
def test_cards_keep_the_licence(tmp_path, shared, licence):
    layer = LAYERS[3:4]
    path = write_atlas(tmp_path / "atlas.h5", layers=layer)
    with open_atlas(path) as atlas:
        images = cards.CardImages(atlas, dataclasses.replace(SMALL, licence=licence))
        sharp = cards.CardImages(atlas, SMALL).examples(atlas["../../x"], 0)
        shown = images.examples(atlas["../../x"], 0)
    assert len(shown) == (0 if licence == "ids" else len(sharp) == 4 and 4)

    def steepest(image: Image.Image) -> float:
        return float(np.abs(np.diff(np.asarray(image, float), axis=0)).max())

    # The examples have an edge in their middle.
    assert min(map(steepest, sharp)) > 20
    assert licence != "blur" or max(map(steepest, shown)) < 5


def test_no_local_path_is_shared(shared):
    for path in [
        *(shared / "u").rglob("*.html"),
        shared / "sitemap.xml",
        shared / "index.html",
        shared / "method.html",
    ]:
        assert str(shared.parent) not in path.read_text(), path
    for path in (shared / "cards").rglob("*.jpg"):
        with Image.open(path) as card:
            assert not card.getexif() and "comment" not in card.info


@pytest.mark.long
def test_cards_of_unchanged_layers_stay(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5", layers=LAYERS[:2])
    config = dataclasses.replace(SMALL, cards="all")
    build(path, config=config)
    card = tmp_path / "site/cards/blocks.0.conv/4.jpg"
    before, old = card.stat().st_ino, (tmp_path / "site/cards/stem/0.jpg").read_bytes()
    assert build(write_atlas(path, layers=LAYERS[:2], seed=9), config=config).rebuilt_units == 6
    assert card.stat().st_ino == before and (tmp_path / "site/cards/stem/0.jpg").read_bytes() != old
    # The address of the site is in pages only.
    assert build(path, config=dataclasses.replace(config, url=URL)).rebuilt_units == 0
    assert card.stat().st_ino == before and f"{URL}/cards/stem/0.jpg" in (tmp_path / "site/u/stem/0.html").read_text()
    build(path, tmp_path / "fresh", dataclasses.replace(config, url=URL))
    assert contents(tmp_path / "site") == contents(tmp_path / "fresh")


def test_settings_say_which_cards_there_are(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5", layers=LAYERS[:1])
    build(path, tmp_path / "layers")
    found = {str(p.relative_to(tmp_path / "layers")) for p in (tmp_path / "layers/cards").rglob("*.jpg")}
    assert found == {"cards/home.jpg", "cards/stem/layer.jpg"}
    page = Page(tmp_path / "layers/u/stem/0.html")
    assert attributes(page, "property")["og:image"] == "../../cards/stem/layer.jpg"
    assert not (tmp_path / "layers/sitemap.xml").exists()
    build(path, tmp_path / "none", dataclasses.replace(SMALL, cards="none"))
    assert not (tmp_path / "none/cards").exists() and not (tmp_path / "none/u").exists()
    assert "og:image" not in (tmp_path / "none/index.html").read_text()


def test_pages_and_cards_of_units_fit_the_limit_of_files():
    many = dataclasses.replace(SMALL, max_files=1000)
    assert Extent.of(many, 333).pages and not Extent.of(many, 334).pages
    everything = Extent.of(dataclasses.replace(many, cards="all"), 500)
    assert everything.unit_cards and everything.files(2, 500) > 1003 and everything.bytes(2, 500) > 500 * 50_000
    with pytest.raises(AtlasError, match=r"site\.cards=all makes 1,002 files for 501 units"):
        Extent.of(dataclasses.replace(many, cards="all"), 501)


# ------------------------------------------------------------------------------------------ citation, download


def test_a_bibtex_entry_from_the_settings():
    facts = {"model": "resnet_50", "created": "2026-01-02T03:04:05", "identity": "ab" * 32}
    entry = links.bibtex(facts, ALL)
    assert entry.startswith("@misc{atlas12026resnet50,\n") and entry.endswith("\n}")
    assert r"title = {{Atlas\_1: resnet\_50}}," in entry and r"author = {Ada Lovelace \& Charles Babbage}," in entry
    assert "year = {2026}," in entry and f"\\url{{{URL}}}" in entry and "note = {Atlas abababababab}," in entry
    assert "author" not in links.bibtex(facts, SMALL) and "howpublished" not in links.bibtex(facts, SMALL)


def test_the_atlas_is_linked_only_where_there_is_one(tmp_path):
    path = write_atlas(tmp_path / "run/atlas.h5", layers=LAYERS[:1])
    site = path.parent / "site"

    def downloads() -> set[str]:
        found = (Page(site / name).all("a") for name in ("index.html", "unit.html"))
        return {str(a["href"]) for links in found for a in links if "atlas.h5" in str(a.get("href"))}

    build(path)
    assert not downloads() and "it is not a part of this site" in Page(site / "index.html").plain
    assert "site.atlas_url=ADDRESS" in "".join(missing_addresses(site, path))
    elsewhere = "https://data.example.org/atlas.h5"
    build(path, config=dataclasses.replace(SMALL, atlas_url=elsewhere))
    assert downloads() == {elsewhere} and "atlas_url" not in "".join(missing_addresses(site, path))
    report = build(path, config=dataclasses.replace(SMALL, copy_atlas=True))
    assert downloads() == {"atlas.h5"} and (site / "atlas.h5").read_bytes() == path.read_bytes()
    assert report.host.largest_file == path.stat().st_size
    assert build(path).files < report.files and not (site / "atlas.h5").exists()


def test_an_atlas_that_is_too_large_is_not_copied(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5", layers=LAYERS[:1])
    with path.open("ab") as file:
        file.write(bytes(1_000_000))
    with pytest.raises(AtlasError, match=r"Put the file elsewhere and set site\.atlas_url"):
        build(path, config=dataclasses.replace(SMALL, copy_atlas=True, max_bytes=1_000_000))
    assert not (tmp_path / "site").exists()


# ------------------------------------------------------------------------------------------------ the home page


def test_the_wall_has_the_units_of_its_rule(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5", layers=LAYERS[1:3])
    with h5py.File(path, "r+") as file:
        group = file["layers/blocks.0.conv/render/distill"]
        count = 20
        group["activation"][:, 0] = 10
        group["robust"][:, 0] = 5
        group["robust"][7, 0] = 9
        group["transfer"][:, 0] = np.linspace(0, 0.5, count)
        group["saturation"][:, 0] = 0.1
        group["saturation"][19, 0] = 0.6
    with open_atlas(path) as atlas:
        values, compared = wall.scores(atlas["blocks.0.conv"], "distill")
        facts = [summarize(layer, order, ()) for order, layer in enumerate(atlas)]
        chosen = wall.choose(atlas, facts, "webp")
    assert compared and np.isnan(values[1]) and np.isnan(values[19])  # failed, and saturated
    assert values[18] == pytest.approx(0.5 * 19 / 20) and values[7] == pytest.approx(0.9 * 8 / 20)
    names = [unit.name for unit in chosen.units]
    assert len(names) == 16 and "blocks.0.conv:36" in names and "blocks.0.conv:38" not in names
    assert sum(name.startswith("blocks.1") for name in names) == sum(
        np.isfinite(wall.scores(open_atlas(path)["blocks.1.conv"], "distill")[0])
    )
    assert "robust share × quantile of transfer" in chosen.rule and "50%" in chosen.rule


def test_the_home_page_begins_with_images(shared):
    page = (shared / "index.html").read_text()
    assert page.index('class="wall"') < page.index('class="facts"') < page.index('class="diagram"')
    images = [a for a in Page(shared / "index.html").all("img") if str(a["src"]).startswith("wall/")]
    assert len(images) == 16
    for image in images:
        assert (shared / str(image["src"]).partition("?")[0]).is_file()


def network(count: int) -> list[NetworkLayer]:
    """A network of stages whose first has two layers only."""
    sizes = [112] * 2 + [56] * 3 + [28] * (count - 6) + [1]
    return [NetworkLayer(f"layer{i}.conv", "conv", 64, (side, side)) for i, side in enumerate(sizes)]


@pytest.mark.parametrize("count", [9, 60, 200])
def test_the_diagram_drops_no_caption_and_names_all_layers(count):
    drawn = diagram.draw([
        diagram.DrawnLayer(layer.name, layer.kind, layer.channels, layer.map_size, None) for layer in network(count)
    ])  # fmt: skip
    captions = [text for *_, text in drawn.stages]
    assert list(dict.fromkeys(captions)) == ["112 × 112", "56 × 56", "28 × 28", "1 × 1"]
    assert len(drawn.boxes) == count and drawn.hollow == count
    for x, y, _ in drawn.stages:  # captions lie apart
        assert all(abs(x - other) >= diagram.CAPTION_WIDTH for other, at, _ in drawn.stages if at == y and other != x)
    for box in drawn.boxes:
        assert box.x >= 0 and box.x + box.width <= drawn.width and box.name_y <= drawn.height
    if count <= 60:
        # At 1,440 pixels the diagram is 1,248 pixels wide.
        assert drawn.height * 1.248 < 600


def test_layers_that_were_not_rendered_are_hollow(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5", layers=LAYERS[:2])
    rows = [("stem", "conv", 6, 16), ("blocks.0.other", "conv", 8, 8), ("blocks.0.norm", "norm", 8, 8),
            ("blocks.0.conv", "conv", 40, 8)]  # fmt: skip
    with h5py.File(path, "r+") as file:
        for key, column in zip(("name", "kind"), list(zip(*rows, strict=True))[:2], strict=True):
            write_array(file, f"model/layers/{key}", np.array(column, object))
        for key, at in (("channels", 2), ("height", 3), ("width", 3)):
            write_array(file, f"model/layers/{key}", np.array([row[at] for row in rows], np.int32))
    build(path)
    page = (tmp_path / "site/index.html").read_text()
    hollow = page.split('<g class="box conv hollow">')[1].split("</g>")[0]
    # Norms are of a kind that the atlas has no layers of.
    assert "blocks.0.other · conv, 8 channels, map 8 × 8, not in this atlas" in hollow and "blocks.0.norm" not in page
    assert page.count('class="box conv"') == 2 and "on a logarithmic scale" in page


def test_a_layer_in_the_middle_of_a_stage_belongs_to_it():
    sizes = [14, 1, 1, 14, 7, 1]
    layers = [NetworkLayer(str(i), "conv", 8, (side, side)) for i, side in enumerate(sizes)]
    assert [(stage.caption, len(stage.layers)) for stage in stages.stages_of(layers)] == [
        ("14 × 14", 4), ("7 × 7", 1), ("1 × 1", 1)
    ]  # fmt: skip


def test_many_layers_fold_by_stage(tmp_path):
    layers = tuple((f"l{i}", "conv", 4, (0, 1), 16 if i < 12 else 8, 3, 16, 3) for i in range(24))
    path = write_atlas(tmp_path / "atlas.h5", layers=layers, pictures=False, examples=False)
    build(path, config=dataclasses.replace(SMALL, cards="none"))
    page = Page(tmp_path / "site/index.html")
    folded = [a for a in page.all("details") if a.get("class") == "stage"]
    assert len(folded) == 2 and not any("open" in a for a in folded)
    assert "16 × 16 · 12 layers: l0 to l11" in page.plain and "8 × 8 · 12 layers: l12 to l23" in page.plain
    assert "2 of 4 units" in layer_page(tmp_path / "site", "l3").plain


def test_the_page_of_nothing_has_a_header_and_searches_for_no_longer_than_it_does(shared, tmp_path):
    page = Page(shared / "404.html")
    assert "Searching" not in page.plain and page.all("header") and page.all("nav")
    # With the address of the site its root is known.
    assert [a["src"] for a in page.all("script")] == ["/an-atlas/static/missing.js"]
    assert {a.get("href") for a in page.all("a")} >= {"/an-atlas/index.html", "/an-atlas/map.html"}


def test_card_texts_stay_within_the_card():
    text = unit_text.UnitText("a.very.long.name." * 9 + ":7", "", "", "", "tabby " * 20, "net", "x " * 80, "")
    buffer = io.BytesIO()
    cards.unit_card(text, None, []).save(buffer, "JPEG")
    assert len(buffer.getvalue()) > 5_000
