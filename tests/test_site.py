"""The site without a browser: files, links, numbers, hostile names, and builds that are cut short."""

import io
import json
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from pipeline.atlas import open_atlas
from pipeline.errors import AtlasError
from pipeline.shards import creating, put, safe
from pipeline.site import SiteConfig, build_site
from pipeline.site import values as v

SIDE = 64
PHOTOS = 12
LABELS = ("tench", "goldfish", "<img src=x onerror=alert(1)>", "hen & cock", 'the "quoted" owl')
HOSTILE_PATH = "a\"b'c/<script>alert(2)</script>.jpg"
# name, kind, channels in the network, channels in the atlas, map, receptive field, picture side and depth
LAYERS = (
    ("stem", "conv", 6, (0, 1, 2, 3, 4, 5), 16, 3, 32, 3),
    ("blocks.0.conv", "conv", 40, tuple(range(0, 40, 2)), 8, 20, 48, 3),
    ("blocks.1.conv", "conv", 9, (2, 5, 7), 8, 30, 48, 1),
    ("../../x", "block", 4, (0, 1, 2, 3), 4, 0, 64, 3),
    ("head", "linear", len(LABELS), tuple(range(len(LABELS))), 1, 0, 64, 3),
)
SMALL = SiteConfig(example_px=32, examples=4)


def photo_of(index: int) -> np.ndarray:
    """Four quarters of different colours, (SIDE, SIDE, 3)."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    half = SIDE // 2
    image[:half, :half] = (250, 10, 10)
    image[:half, half:] = (10, 250, 10)
    image[half:, :half] = (10, 10, 250)
    image[half:, half:] = 15 * index
    return image


def write_atlas(path: Path, pictures: bool = True, examples: bool = True, layers=LAYERS) -> Path:
    """A small atlas with hostile names, a failed and a silent unit, two objectives and two variants."""
    rng = np.random.default_rng(0)
    with creating(path) as file:
        file.attrs.update(
            schema="neuron-atlas", schema_version=1, model="tiny", weights_sha256="ab" * 32,
            dataset_fingerprint="cd" * 32, versions=json.dumps({"torch": "9.9", "numpy": "8.8"}),
            created="2026-01-02T03:04:05+00:00", run="test", failures=1,
        )  # fmt: skip
        file.create_group("layers")
        file.create_dataset("provenance/config", data="model: tiny\nname: '</pre><script>alert(3)</script>'\n")
        put(file, "model/labels", np.array(LABELS, object))
        for order, layer in enumerate(layers):
            write_layer(file, rng, order, layer, pictures, examples)
        if examples:
            write_photos(file)
    return path


def write_layer(file: h5py.File, rng: np.random.Generator, order: int, layer, pictures: bool, examples: bool) -> None:
    name, kind, total, channels, side, field, size, depth = layer
    group = file.create_group(f"layers/{safe(name)}")
    stride = SIDE // side
    group.attrs.update(
        name=name, order=order, kind=kind, channels=total, map_height=side, map_width=side,
        receptive_field=[field] * 2, receptive_field_stride=[stride] * 2,
        receptive_field_offset=[-(field // 2)] * 2, input_size=[SIDE] * 2,
    )  # fmt: skip
    count, k = len(channels), 5
    put(group, "channels", np.array(channels, np.int32))
    best = rng.uniform(1, 9, count).astype(np.float32)
    if examples:
        largest = best * 2
        if name == "stem":
            best[3], largest[3] = -0.5, -0.25
        put(group, "examples/max/value", (largest[:, None] - np.arange(k) * 0.1).astype(np.float32))
        index = np.stack([rng.permutation(PHOTOS)[:k] for _ in range(count)]).astype(np.int32)
        index[:, 3:] = np.where(np.arange(count)[:, None] % 2, -1, index[:, 3:])
        put(group, "examples/max/index", index)
        put(group, "examples/max/y", np.zeros((count, k), np.int32))
        put(group, "examples/max/x", np.full((count, k), side - 1, np.int32))
        for key, value in (("mean", best * -0.1), ("max", largest), ("best_mean", best)):
            put(group, f"stats/{key}", value.astype(np.float32))
        put(group, "stats/nonzero", rng.uniform(0, 1, count).astype(np.float32))
    for objective, variants in (("channel", 1), ("neuron", 2)) if pictures else ():
        if objective == "neuron" and name != "blocks.1.conv":
            continue
        render = f"render/{objective}"
        shape = (count, variants)
        colours = rng.integers(0, 255, (count, variants, 1, 1, depth))
        images = np.broadcast_to(colours, (count, variants, size, size, depth)).astype(np.uint8)
        put(group, f"{render}/images", images)
        for key in ("activation", "robust", "start", "seconds"):
            put(group, f"{render}/{key}", rng.normal(3, 1, shape).astype(np.float32))
        put(group, f"{render}/seed", rng.integers(0, 2**62, shape))
        put(group, f"{render}/steps", np.full(shape, 512, np.int32))
        put(group, f"{render}/trace", np.zeros((*shape, 16), np.float32))
        status = np.full(shape, "converged", object)
        if name == "blocks.0.conv":
            status[1] = "failed"
        put(group, f"{render}/status", status)
        natural = "mean" if objective == "channel" else "max"
        group[render].attrs.update(natural=natural, preset="distill", digest=f"{order}f" * 32)


def write_photos(file: h5py.File) -> None:
    paths = [f"val/{i:03d}.jpg" for i in range(PHOTOS)]
    paths[1] = HOSTILE_PATH
    put(file, "dataset/path", np.array(paths, object))
    put(file, "dataset/label", np.array([LABELS[i % len(LABELS)] for i in range(PHOTOS)], object))
    put(file, "dataset/source", np.arange(PHOTOS))
    # The last photograph is shown nowhere, as in an atlas that was cut down.
    blobs = []
    for i in range(PHOTOS - 1):
        buffer = io.BytesIO()
        Image.fromarray(photo_of(i)).save(buffer, "JPEG", quality=95, subsampling=0)
        blobs.append(buffer.getvalue())
    put(file, "dataset/shown/index", np.arange(PHOTOS - 1, dtype=np.int32))
    put(file, "dataset/shown/offset", np.cumsum([0, *map(len, blobs)]))
    put(file, "dataset/shown/jpeg", np.frombuffer(b"".join(blobs), np.uint8))


def build(path: Path, folder: Path | None = None, config: SiteConfig = SMALL):
    with open_atlas(path) as atlas:
        return build_site(atlas, folder or path.parent / "site", config)


class Page(HTMLParser):
    """Elements of a page as (tag, attributes), and its text by article."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data: dict[str, list[str]] = {"": []}
        self.words = ""
        self.spaced = ""
        self._article = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "article":
            self._article = attributes["id"] or ""
            self.data[self._article] = []
        if tag == "data":
            self.data[self._article].append(attributes["value"] or "")

    def handle_endtag(self, tag):
        if tag == "article":
            self._article = ""

    def handle_data(self, data):
        self.words += data
        self.spaced += " " + data

    @property
    def ids(self) -> set[str]:
        return {a["id"] for _, a in self.elements if a.get("id")}  # type: ignore[misc]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag]


def pages_of(site: Path) -> dict[Path, Page]:
    return {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    path = write_atlas(tmp_path_factory.mktemp("run") / "atlas.h5")
    build(path)
    return path.parent / "site"


def layer_page(site: Path, name: str) -> Page:
    return Page(site / "layers" / f"{safe(name)}.html")


def check_links(site: Path) -> int:
    """Every link and source is a file of the site, or the atlas beside it; every anchor exists. Their number."""
    pages, count = pages_of(site), 0
    for path, page in pages.items():
        for tag, attributes in page.elements:
            for key in ("href", "src"):
                link = attributes.get(key)
                if link is None:
                    continue
                parts = urllib.parse.urlsplit(link)
                assert not parts.scheme and not parts.netloc, (path, tag, link)
                target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
                assert target.is_file(), (path, tag, link)
                outside = site.resolve() not in target.parents
                assert not outside or target == site.resolve().parent / "atlas.h5", (path, link)
                if parts.fragment:
                    assert parts.fragment in pages[target].ids, (path, link)
                count += 1
    return count


def test_links_lead_somewhere(site):
    assert check_links(site) > 100


def test_ids_are_unique(site):
    for page in pages_of(site).values():
        ids = [a["id"] for _, a in page.elements if a.get("id")]
        assert len(ids) == len(set(ids)), page.path


def test_report_counts_what_is_there(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    heard = []
    with open_atlas(path) as atlas:
        report = build_site(atlas, tmp_path / "site", SMALL, lambda done, total: heard.append((done, total)))
        table = atlas.units()
        units = sum(len(layer.channels) for layer in atlas)
    files = [p for p in (tmp_path / "site").rglob("*") if p.is_file()]
    assert report.files == len(files)
    assert report.bytes == sum(p.stat().st_size for p in files)
    assert (report.layers, report.units, report.pictures) == (len(LAYERS), units, len(table))
    assert heard == [(i + 1, units) for i in range(units)]


def test_numbers_are_those_of_the_store(site):
    with open_atlas(site.parent) as atlas:
        for layer in atlas:
            page = layer_page(site, layer.name)
            stats, best = layer.stats(), layer.examples()
            for row, channel in enumerate(layer.channels):
                written = page.data[str(channel)]
                expected = [stats[key][row] for key in ("mean", "max", "nonzero")]
                assert best is not None
                expected += [value for value, i in zip(best.value[row], best.index[row], strict=True) if i >= 0][:4]
                for objective in layer.presets:
                    numbers = layer.numbers(objective)
                    for key in ("activation", "robust", "start", "seconds"):
                        expected += list(numbers[key][row])
                    expected.append(layer.natural(objective)[row])
                    for key in ("seed", "steps"):
                        assert {str(n) for n in numbers[key][row]} <= set(written)
                floats = {np.float32(text) for text in written}
                assert {np.float32(e) for e in expected} <= floats, (layer.name, channel)
                natural = float(layer.natural("channel")[row])
                times = float(layer.numbers("channel")["activation"][row, 0]) / natural
                tile = next(a for a in page.all("li") if a.get("data-channel") == str(channel))
                if natural > 0:
                    assert float(tile["data-ratio"] or "nan") == pytest.approx(times, rel=1e-4)
                else:
                    assert "data-ratio" not in tile


def test_home_tells_the_facts(site):
    page = Page(site / "index.html")
    words = " ".join(page.spaced.split())
    with open_atlas(site.parent) as atlas:
        units = sum(len(layer.channels) for layer in atlas)
        total = sum(layer.total_channels for layer in atlas)
    facts = [f"Units {units}", f"Photographs {PHOTOS}", "Failures 1", v.share(units / total).text, "torch 9.9"]
    facts += ["model: tiny", "Feature Visualization", "distill", "20 of 40", "1 unit with a failed picture"]
    for fact in facts:
        assert fact in words, fact
    order = [a["href"] for a in page.all("a") if (a["href"] or "").endswith(".html")]
    assert [h for h in order if h != "index.html"] == [f"layers/{safe(layer[0])}.html" for layer in LAYERS]


def test_pictures_and_crops_show_the_right_thing(site):
    with open_atlas(site.parent) as atlas:
        for name in ("stem", "blocks.1.conv"):
            layer = atlas[name]
            for channel in layer.channels:
                image = Image.open(site / f"media/{safe(name)}/{channel}.webp").convert("RGB")
                stored = layer.picture(channel)
                assert image.size == stored.shape[1::-1]
                assert np.abs(np.asarray(image).mean((0, 1)) - stored.mean((0, 1))).max() < 6
        assert (site / "media/blocks.1.conv/2-neuron-1.webp").is_file()
        # The unit in the upper right corner sees the green quarter, wherever the photograph comes from.
        best = atlas["blocks.0.conv"].examples()
        assert best is not None
        cell = next(i for i in range(3) if best.index[0, i] != PHOTOS - 1)
        with Image.open(site / "media/blocks.0.conv/0-examples.webp") as strip:
            assert strip.size == (4 * 32, 32)
            first = np.asarray(strip.convert("RGB"))[:, 32 * cell :]
            assert np.abs(first[2:12, 20:30].mean((0, 1)) - (10, 250, 10)).max() < 12
        # A unit that sees everything is shown the whole photograph, red in the upper left.
        best = atlas["head"].examples()
        assert best is not None
        cell = next(i for i in range(3) if best.index[0, i] != PHOTOS - 1)
        with Image.open(site / "media/head/0-examples.webp") as strip:
            whole = np.asarray(strip.convert("RGB"))[:, 32 * cell : 32 * (cell + 1)]
            assert np.abs(whole[3:13, 3:13].mean((0, 1)) - (250, 10, 10)).max() < 12


def test_all_images_have_words_and_sizes(site):
    for page in pages_of(site).values():
        for image in page.all("img"):
            assert image.get("alt") is not None and image.get("width") and image.get("height"), (
                page.path,
                image,
            )
            assert image["alt"] or "icon.svg" in (image["src"] or "")


def test_hostile_text_stays_text(site):
    for page in pages_of(site).values():
        for script in page.all("script"):
            assert set(script) == {"src", "defer"}
        assert not page.all("style")
        for tag, attributes in page.elements:
            bad = [key for key in attributes if key == "style" or key.startswith("on")]
            assert not bad, (page.path, tag, bad)
    head = layer_page(site, "head")
    assert LABELS[2] in head.words and LABELS[4] in head.words
    titles = [a.get("title") or "" for page in pages_of(site).values() for a in page.all("li")]
    assert any(HOSTILE_PATH in title for title in titles)
    assert "</pre><script>alert(3)</script>" in Page(site / "index.html").words
    index = (site / "static/layers.js").read_text()
    assert "<" not in index
    names = json.loads(index.removeprefix("window.NEURON_ATLAS=").removesuffix(";\n"))
    assert [entry[0] for entry in names["layers"]] == [layer[0] for layer in LAYERS]
    assert [2, 2] not in names["layers"][1][2][:1] and names["layers"][0][2] == [[0, 5]]
    assert ["goldfish", 4, 1] in names["classes"]


def test_nothing_is_written_outside(tmp_path):
    path = write_atlas(tmp_path / "run" / "atlas.h5")
    build(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["atlas.h5", "site"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert (path.parent / "site/layers" / f"{safe('../../x')}.html").is_file()


def test_pages_forbid_all_but_their_own(site):
    for page in pages_of(site).values():
        policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None and policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
    for path in site.rglob("*"):
        if path.suffix in (".css", ".js"):
            text = path.read_text()
            assert "http://" not in text and "https://" not in text and "fetch(" not in text


def test_failed_and_silent_units_are_flagged(site):
    page = layer_page(site, "blocks.0.conv")
    flagged = [a["id"] for a in page.all("article") if a.get("class") == "failed"]
    assert flagged == ["2"]
    assert "The optimisation failed" in page.words
    stem = layer_page(site, "stem")
    assert stem.words.count("never above zero") == 1
    assert "so there is no ratio" in stem.words


def test_without_examples(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5", examples=False)
    report = build(path)
    assert report.pictures > 0
    assert check_links(tmp_path / "site") > 50
    assert not list((tmp_path / "site").rglob("*-examples.webp"))
    page = layer_page(tmp_path / "site", "stem")
    assert "No photographs are kept for this unit" in page.words
    assert "nan" not in page.words.lower()
    assert "holds no photographs" in Page(tmp_path / "site/index.html").words


def test_without_pictures(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5", pictures=False)
    assert build(path).pictures == 0
    assert check_links(tmp_path / "site") > 50
    page = layer_page(tmp_path / "site", "stem")
    assert "activation" not in page.data and "achieved" not in page.words
    assert "largest response" in page.words
    assert "holds no pictures" in Page(tmp_path / "site/index.html").words


def test_with_neither_and_with_nothing(tmp_path):
    build(write_atlas(tmp_path / "a" / "atlas.h5", pictures=False, examples=False))
    assert check_links(tmp_path / "a/site") > 20
    assert "no picture" in layer_page(tmp_path / "a/site", "stem").words
    build(write_atlas(tmp_path / "b" / "atlas.h5", layers=()))
    assert "This atlas has no layers" in Page(tmp_path / "b/site/index.html").words
    layers = (("empty", "conv", 7, (), 4, 3, 32, 3),)
    build(write_atlas(tmp_path / "c" / "atlas.h5", pictures=False, examples=False, layers=layers))
    assert "No unit of this layer" in layer_page(tmp_path / "c/site", "empty").words


def test_no_examples_wanted(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    build(path, config=SiteConfig(examples=0))
    assert not list((tmp_path / "site").rglob("*-examples.webp"))


def test_a_site_elsewhere_has_no_download(tmp_path):
    path = write_atlas(tmp_path / "run" / "atlas.h5")
    build(path, tmp_path / "elsewhere" / "site")
    page = Page(tmp_path / "elsewhere/site/index.html")
    assert not [a for a in page.all("a") if "atlas.h5" in (a["href"] or "")]
    assert "atlas.h5" in page.words


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_atlas_same_bytes(site, tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    build(path)
    first = contents(tmp_path / "site")
    build(path)
    assert contents(tmp_path / "site") == first == contents(site)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_build_keeps_the_old_site(tmp_path, error):
    path = write_atlas(tmp_path / "atlas.h5")
    build(path)
    before = contents(tmp_path / "site")

    def stop(done: int, total: int) -> None:
        if done == total - 1:
            raise error()

    with open_atlas(path) as atlas, pytest.raises(error):
        build_site(atlas, tmp_path / "site", SiteConfig(title="Another"), stop)
    assert contents(tmp_path / "site") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["atlas.h5", "site"]


def test_an_interrupted_first_build_leaves_nothing(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with open_atlas(path) as atlas, pytest.raises(KeyboardInterrupt):
        build_site(atlas, tmp_path / "site", SMALL, stop)
    assert [p.name for p in tmp_path.iterdir()] == ["atlas.h5"]


def test_a_new_build_replaces_all_of_the_old(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    build(path)
    build(write_atlas(path, layers=LAYERS[:1]))
    assert [p.name for p in (tmp_path / "site/layers").iterdir()] == ["stem.html"]


def test_leftovers_of_a_killed_build_are_mended(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    build(path)
    before = contents(tmp_path / "site")
    # Killed between the two renames, while another one was being written.
    (tmp_path / "site").rename(tmp_path / ".site.old")
    (tmp_path / ".site.new").mkdir()
    (tmp_path / ".site.new/half.html").write_text("half")
    build(path)
    assert contents(tmp_path / "site") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["atlas.h5", "site"]


def test_foreign_folders_are_left_alone(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(AtlasError, match="no site of Neuron Atlas"):
        build(path, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    build(path, tmp_path / "empty")
    assert (tmp_path / "empty/index.html").is_file()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.23456, "1.23"), (-12.345, "−12.3"), (0.012345, "0.012"), (1234.5, "1,234"), (3e-5, "3.0 × 10⁻⁵"),
     (2.5e9, "2.5 × 10⁹"), (float("nan"), "—"), (float("inf"), "—")],
)  # fmt: skip
def test_numbers_for_people(value, text):
    assert v.number(value).text == text


def test_shares_and_ratios_do_not_lie():
    assert [v.share(s).text for s in (0, 0.0001, 0.12345, 0.9999, 1)] == [
        "0%",
        "< 0.1%",
        "12.3%",
        "99.9%",
        "100%",
    ]
    assert v.ratio(6, 2).text == "3.00"
    assert v.ratio(6, -2) == v.ratio(6, 0) == v.ratio(float("nan"), 2) == v.ratio(6, float("nan"))
    assert float(v.number(np.float32(0.1)).exact) == pytest.approx(0.1)
    assert np.float32(v.number(np.float32(1) / 3).exact) == np.float32(1) / np.float32(3)
