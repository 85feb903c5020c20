"""The site in a real browser, from disk and from a sub-folder of a web host."""

import functools
import http.server
import itertools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_site import FAMILIES, LABELS, LAYERS, build, write_atlas

from pipeline.core.metric_specs import GRID_METRICS, IMAGE_METRICS, RATIO_METRICS, RELATION_METRICS, metric_named
from pipeline.site.config import SiteConfig
from pipeline.site.hosting.serve import server
from pipeline.store.reader import open_atlas
from pipeline.store.shards import safe_name

axe = pytest.importorskip("axe_playwright_python.base")

sync_api = pytest.importorskip("playwright.sync_api")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
HOME, MAP, METHOD, FAMILY = "index.html", "map.html", "method.html", "families.html"
STEM, EVEN, GREY, HOSTILE, HEAD = (f"layers/{safe_name(layer[0])}.html" for layer in LAYERS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if BROWSER is None:
        message = "no Chromium on this machine: `apt-get install chromium`"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a web host would serve; the site is in `somewhere/below/site`."""
    served = tmp_path_factory.mktemp("served")
    path = write_atlas(served / "somewhere/below/atlas.h5")
    (path.parent / "families.yaml").write_text(FAMILIES)
    build(path)
    return served


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


# Pages are the same from both; they differ in how they load, so the default suite loads pages from both and uses them
# from disk.
@pytest.fixture(scope="module", params=["disk", pytest.param("web", marks=pytest.mark.long)])
def base(request, folder) -> Iterator[str]:
    """Address of the site, with a slash at the end."""
    if request.param == "disk":
        yield f"file://{folder}/somewhere/below/site/"
        return
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/somewhere/below/site/"
        server.shutdown()
        thread.join()


@pytest.fixture
def visit(browser, base) -> Iterator[Callable[..., Any]]:
    """Open a page in a fresh window; at the end nothing may have gone wrong or asked another host."""
    faults: list[str] = []
    windows = []

    def request(asked: Any) -> None:
        if not asked.url.startswith((base, "data:", "blob:")):
            faults.append(f"asked {asked.url}")

    def response(answer: Any) -> None:
        if answer.status >= 400:
            faults.append(f"{answer.status} for {answer.url}")

    def failed(asked: Any) -> None:
        # Leaving a page calls off what it was still loading.
        if asked.failure != "net::ERR_ABORTED":
            faults.append(f"{asked.failure} for {asked.url}")

    def dialog(shown: Any) -> None:
        faults.append(f"dialog {shown.message}")
        shown.dismiss()

    def go(to: str, width: int = 1440, script: bool = True) -> Any:
        window = browser.new_context(viewport={"width": width, "height": 800}, java_script_enabled=script)
        windows.append(window)
        page = window.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda m: faults.append(f"console {m.text}") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: faults.append(f"error {e}"))
        page.on("request", request)
        page.on("requestfailed", failed)
        page.on("response", response)
        page.on("dialog", dialog)
        page.goto(base + to)
        if script and to.startswith(("layers/", "unit.html#", "map.html")):
            page.wait_for_function("() => document.body?.dataset.ready")
        return page

    yield go
    for window in windows:
        window.close()
    assert not faults


UNIT = "unit.html#blocks.0.conv:20"
OTHERS = (
    "circuit.html#stem:1,blocks.0.conv:20",
    "class.html",
    "class.html#goldfish",
    "embed.html#blocks.0.conv:20",
    "pinned.html#blocks.0.conv:20,stem:1",
)
EVERY = (HOME, STEM, EVEN, GREY, HOSTILE, HEAD, UNIT, "unit.html#../../x:1", MAP, METHOD, FAMILY, *OTHERS)


def shown(page: Any) -> list[str]:
    """Channels of the tiles that are not hidden, in order."""
    return page.eval_on_selector_all(".tile", "all => all.filter(e => e.offsetParent).map(e => e.dataset.channel)")


def unit(page: Any) -> str:
    """The unit that the page shows, when it does."""
    return page.locator("article.unit").first.get_attribute("data-unit-shown")


def unit_under_pointer(page: Any, spot: dict[str, float], places: range) -> str:
    """Move the pointer along the middle of the map until it names a unit; return the name."""
    for x in places:
        page.mouse.move(spot["x"] + x, spot["y"] + spot["height"] / 2)
        if page.locator("#map-tip").is_visible():
            break
    return page.locator("#map-tip b").inner_text()


def arrives(page: Any, name: str) -> None:
    """Wait until the unit is shown."""
    page.wait_for_function("name => document.body?.dataset.ready === name", arg=name)
    assert unit(page) == name


# Narrow from disk in the short suite; the others take half a minute each.
LOADED = [
    ("disk", 360),
    pytest.param("web", 1440, marks=pytest.mark.long),
    pytest.param("disk", 1440, marks=pytest.mark.long),
    pytest.param("web", 360, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("base", "width"), LOADED, indirect=["base"])
@pytest.mark.long
def test_everything_fits_and_loads(visit, base, width):
    for to in EVERY:
        page = visit(to, width)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), to
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
            assert min(ground) > 200 if scheme == "light" else max(ground) < 60
        page.evaluate("for (const image of document.images) image.loading = 'eager'")
        page.evaluate("Promise.all(Array.from(document.images, (image) => image.decode()))")
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        page.wait_for_timeout(60)
        page.context.close()


@pytest.mark.long
@pytest.mark.parametrize("base", ["disk"], indirect=True)
def test_axe_finds_nothing_serious(visit, base):
    for to in (HOME, EVEN, UNIT, MAP, METHOD, FAMILY, *OTHERS):
        page = visit(to)
        page.wait_for_timeout(200)
        nothing_serious(page, to)
        page.context.close()


def nothing_serious(page, to: str) -> None:
    """axe-core finds no serious violation on a page as it stands, in light and in dark."""
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text())
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(100)
        # Colours are all that differs in the dark.
        rules = "" if scheme == "light" else ", runOnly: ['color-contrast']"
        found = page.evaluate(f"axe.run(document, {{preload: false{rules}}}).then(r => r.violations)")
        serious = [
            (to, scheme, v["id"], [n["html"][:160] for n in v["nodes"][:3]])
            for v in found
            if v["impact"] in ("serious", "critical")
        ]
        assert not serious, json.dumps(serious, indent=1)


def test_from_home_to_a_unit(visit):
    page = visit(HOME)
    page.locator(".card h3 a").nth(1).click()
    page.wait_for_url("**/blocks.0.conv.html")
    page.locator(".tile[data-channel='20']").click()
    arrives(page, "blocks.0.conv:20")
    page.get_by_role("link", name="What the numbers mean").click()
    page.wait_for_url("**/method.html#numbers")
    page.go_back()
    arrives(page, "blocks.0.conv:20")


def test_the_diagram_leads_to_layers(visit, base):
    page = visit(HOME)
    page.locator(".diagram a").nth(3).click()
    page.wait_for_url(base + HOSTILE)


@pytest.mark.parametrize(
    ("asked", "name"),
    [("blocks.0.conv:38", "blocks.0.conv:38"), ("0.conv:4", "blocks.0.conv:4"), ("../../x:2", "../../x:2"),
     ("%2E%2E/..%2Fx:3", "../../x:3")],
)  # fmt: skip
def test_a_unit_has_an_address(visit, asked, name):
    arrives(visit(f"unit.html#{asked}"), name)


def test_addresses_of_the_former_site_and_of_nothing(visit, base):
    page = visit(HOME)
    page.goto(base + EVEN + "#20")
    arrives(page, "blocks.0.conv:20")
    page.goto(base + "unit.html#blocks.0.conv:3")
    page.get_by_text("blocks.0.conv has no channel 3 in this atlas.").wait_for()
    page.goto(base + "unit.html#<img src=x onerror=alert(4)>:1")
    page.get_by_text("This atlas has no such unit.").wait_for()


def test_a_unit_shows_what_the_store_holds(visit, folder):
    page = visit(UNIT)
    with open_atlas(folder / "somewhere/below") as atlas:
        layer = atlas["blocks.0.conv"]
        row = layer.row(20)
        numbers = layer.measurements()
        best = layer.examples("max")
        assert best is not None
        expected = [numbers[key][row, 0] for key in ("activation", "robust", "start", "seconds")]
        expected += [layer.dataset_max()[row], *best.value[row][:3], *(v[row] for v in layer.stats().values())]
        labels = atlas.dataset_labels
    written = page.eval_on_selector_all("data", "all => all.map(e => e.value)")
    floats = {np.float32(text) for text in written if text not in ("true", "false")}
    assert {np.float32(e) for e in expected if not isinstance(e, np.bool_)} <= floats
    assert str(numbers["seed"][row, 0]) in written and str(numbers["steps"][row, 0]) in written
    text = page.locator("article").inner_text()
    assert "Even <b>ones</b>" not in text and labels[row % len(labels)] in text
    alt = page.locator(".pictures [role=img]").get_attribute("aria-label")
    assert alt.startswith("Feature visualization of blocks.0.conv:20, distill: mean activation ")
    page.locator(".similar").scroll_into_view_if_needed()
    page.locator(".similar .near").nth(7).wait_for()


def test_wired_units_are_shown(visit):
    page = visit(UNIT)
    near = page.locator(".wiring .near")
    assert ["".join(text.split()) for text in near.all_inner_texts()] == ["5−1.25", "0+0.750"]
    note = page.locator(".wiring .note").inner_text()
    assert "times the standard deviation of the input unit" in note and note.endswith("blocks.0.norm, blocks.0.conv.")
    near.first.click()
    arrives(page, "stem:5")


def test_kernels_of_connections_are_drawn(visit):
    page = visit("unit.html#stem:1")
    near = page.locator(".wiring .near")
    label = near.first.get_attribute("aria-label")
    assert label == "blocks.0.conv:20, +1.25, excites, sum of weights +1.50"
    canvas = page.locator(".wiring canvas").first
    assert canvas.get_attribute("aria-label") == "Kernel of 3 × 3 weights: excites, sum +1.50"
    colors = canvas.evaluate("c => Array.from(c.getContext('2d').getImageData(0, 0, 3, 3).data)")
    assert colors[:3] == [38, 96, 188] and colors[16:19] == [226, 224, 219] and colors[32:35] == [196, 62, 36]
    note = page.locator(".wiring .note").inner_text()
    assert "through a.project; past a.expand and through them (residual)" in note and "mean gates" in note


def test_a_circuit_is_walked_and_the_walk_is_in_the_address(visit, base):
    def goes_on(name: str) -> None:
        page.wait_for_function(
            "name => document.body?.dataset.ready === name && document.querySelector('.walk')", arg=name
        )

    page = visit("unit.html#stem:1")
    page.get_by_text("Walk the circuit").click()
    page.wait_for_url(base + "circuit.html#stem:1")
    goes_on("stem:1")
    assert page.locator(".walk .inputs .note").inner_text() == "This atlas has no connections to a layer before."
    first = page.locator(".walk .outputs a.wire").first
    text = " ".join(first.inner_text().split())
    assert text.startswith(
        "blocks.0.conv:20 excites strength +1.25 sum of weights +1.50 of it by the residual path +1.25"
    )
    assert text.endswith("attribution +0.500") and first.locator("canvas").count() == 1
    assert "attribution −0.750" in " ".join(page.locator(".attributed .wire").inner_text().split())
    first.focus()
    page.keyboard.press("Enter")
    page.wait_for_url(base + "circuit.html#stem:1,blocks.0.conv:20")
    goes_on("blocks.0.conv:20")
    assert page.locator(".trail li").all_inner_texts() == ["stem:1", "blocks.0.conv:20"]
    # A connection without a kernel has no empty image.
    assert page.locator(".walk .inputs .wire").count() == 2 and page.locator(".walk canvas").count() == 0
    page.locator(".walk .inputs a.wire").first.click()
    goes_on("stem:5")
    page.keyboard.press("Backspace")
    goes_on("blocks.0.conv:20")
    assert page.url == base + "circuit.html#stem:1,blocks.0.conv:20"
    page.locator(".trail a").first.click()
    goes_on("stem:1")
    page.goto(base + "circuit.html#stem:1,<img src=x onerror=alert(9)>:1")
    page.get_by_text("This atlas has no such unit.").wait_for()


def test_several_pictures_of_a_unit(visit):
    page = visit("unit.html#blocks.1.conv:5")
    titles = page.locator(".pictures figcaption b").all_inner_texts()
    assert titles == ["distill", "neuron, 1", "neuron, 2"]
    assert page.locator(".provenance tbody tr").count() == 3


def test_pixels_fade_by_the_mask_and_the_picture_stays(visit, base, folder, tmp_path):
    page = visit("unit.html#blocks.1.conv:5")
    toggle, veils = page.locator(".masking button"), page.locator(".pictures .veil")
    assert toggle.get_attribute("aria-pressed") == "false" and not veils.first.is_visible()
    before = page.locator(".pictures .pic").first.get_attribute("style")
    toggle.click()
    assert toggle.get_attribute("aria-pressed") == "true" and veils.first.is_visible() and veils.count() == 3
    assert "/m0-" in veils.first.get_attribute("style")
    assert page.locator(".pictures .pic").first.get_attribute("style") == before
    page.wait_for_load_state("networkidle")
    shot = tmp_path / "faded.png"
    page.locator(".pictures .pic").first.screenshot(path=shot)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(float)
    with open_atlas(folder / "somewhere/below") as atlas:
        layer = atlas["blocks.1.conv"]
        rgba = layer.transparent(5).astype(float)
    height, width, _ = pixels.shape
    for column in (0.25, 0.75):
        *color, alpha = rgba[rgba.shape[0] // 2, int(rgba.shape[1] * column)]
        expected = [255 - (255 - value) * alpha / 255 for value in color]  # on white
        assert np.abs(pixels[height // 2, int(width * column)] - expected).max() < 12
    page.reload()
    page.wait_for_function("() => document.body?.dataset.ready")
    assert page.locator(".pictures .veil").first.is_visible()  # the choice is remembered
    button = page.locator(".pictures button.plain").first
    if base.startswith("file:"):
        button.click()
        page.get_by_text("A browser reads no pixels of pages from disk").wait_for()
        return
    with page.expect_download() as download:
        button.click()
    download.value.save_as(tmp_path / "unit.png")
    with Image.open(tmp_path / "unit.png") as image:
        assert image.mode == "RGBA"
        found = np.asarray(image).astype(float)
    assert np.abs(found[8, [8, -8], 3] - rgba[8, [8, -8], 3]).max() < 8


def test_measures_of_pictures_are_told_with_a_word_on_each(visit, folder):
    page = visit("unit.html#blocks.1.conv:5")
    table = page.locator(".quality table")
    heads = table.locator("thead th").all_inner_texts()
    assert heads == ["measure", "distill", "neuron, 1", "neuron, 2"]
    with open_atlas(folder / "somewhere/below") as atlas:
        layer = atlas["blocks.1.conv"]
        row = layer.row(5)
        # Ratios and quantiles are shown for these.
        behind = {"peak", "spatial_mean", "contrast", "chroma"}
        metrics = {metric.name for metric in (*RATIO_METRICS, *IMAGE_METRICS, *RELATION_METRICS)} - behind
        for name in sorted(metrics):
            line = table.locator(f"tr[data-measure={name}]")
            written = line.locator("data").evaluate_all("all => all.map(e => e.value)")
            stored = [v for preset in layer.presets for v in layer.measurements(preset)[name][row] if np.isfinite(v)]
            assert [np.float32(text) for text in written] == stored, name
            assert line.locator("th").inner_text() == metric_named(name).title
            meaning = page.locator(f".quality [data-meaning={name}]")
            assert meaning.text_content() == metric_named(name).explanation and len(written) > 0
    # An atlas of before there were measures has no such table.
    assert visit("unit.html#stem:2").locator(".quality").count() == 0


def test_failed_and_silent_units_say_so(visit):
    page = visit("unit.html#blocks.0.conv:2")
    assert "The optimization failed" in page.locator(".figures").inner_text()
    assert page.locator(".opening .tag").inner_text() == "Even <b>ones</b>"
    page = visit("unit.html#stem:3")
    assert "never above zero" in page.locator(".subtitle").inner_text()


def test_toggle(visit):
    page = visit(UNIT)
    frame = page.locator(".examples .frame").first
    box = "e => getComputedStyle(e.firstChild).backgroundImage"
    assert "/media/blocks.0.conv/x0.jpg" in frame.evaluate(box)
    page.get_by_text("Heat map", exact=True).click()
    canvas = page.locator(".examples canvas.heat").first
    canvas.wait_for()
    assert canvas.evaluate("c => [c.width, c.height]") == [4, 3]
    sums = canvas.evaluate("c => Array.from(c.getContext('2d').getImageData(0, 0, 4, 3).data).reduce((a, b) => a + b)")
    assert sums > 0
    page.get_by_text("Whole image", exact=True).click()
    assert "/photos/" in frame.evaluate(box) and page.locator(".examples canvas").count() == 0
    # What the unit saw is the upper right corner of the part that the network saw.
    seen, whole = (page.locator(s).first.bounding_box() for s in (".examples .seen", ".examples .frame .pic"))
    assert whole["width"] == pytest.approx(2 * whole["height"], rel=0.02)
    assert seen["x"] + seen["width"] == pytest.approx(whole["x"] + whole["width"], abs=3)
    assert seen["y"] == pytest.approx(whole["y"], abs=3)
    page.reload()
    page.wait_for_function("() => document.body?.dataset.ready")
    assert page.locator("input[value=whole]").is_checked()


def test_spectrum(visit):
    page = visit(UNIT)
    page.locator(".spectrum").scroll_into_view_if_needed()
    page.wait_for_selector(".bins [aria-pressed=true]")
    pressed = page.locator(".bins [aria-pressed=true]")
    assert pressed.inner_text() == "75–100 %"
    assert page.locator(".spectrum .example").count() == 2
    values = page.locator(".spectrum .example data").all_inner_texts()
    page.locator(".bins button").first.click()
    assert page.locator(".bins [aria-pressed=true]").inner_text() == "0–25 %"
    assert page.locator(".spectrum .example data").all_inner_texts() != values
    page.locator(".zone").nth(1).dispatch_event("pointerenter")
    assert pressed.inner_text() == "25–75 %"


@pytest.mark.parametrize(
    ("start", "asked", "to"),
    [
        (HOME, "blocks.0.conv:38", "unit.html#blocks.0.conv:38"),
        (HOME, "0.conv:4", "unit.html#blocks.0.conv:4"),
        (STEM, " STEM : 5 ", "unit.html#stem:5"),
        (STEM, "head", HEAD),
        (EVEN, "10", "unit.html#blocks.0.conv:10"),
        (HEAD, "../../x:2", "unit.html#../../x:2"),
        (HOME, "even", "families/"),
        (MAP, "head: goldfish", "unit.html#head:1"),
    ],
)
def test_search_leads_there(visit, base, start, asked, to):
    page = visit(start)
    page.keyboard.press("/")
    page.keyboard.type(asked)
    page.keyboard.press("Enter")
    page.wait_for_url(lambda url: url.startswith(base + to))


def test_search_shows_and_says(visit, base):
    page = visit(METHOD)
    box = page.get_by_label("Search", exact=True)
    box.fill("onerror")
    page.wait_for_selector("#results [role=option]")
    options = page.locator("#results [role=option]")
    assert options.count() > 5 and LABELS[2] in options.first.inner_text()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert options.nth(1).get_attribute("aria-selected") == "true"
    for asked, answer in (
        ("blocks.0.conv:3", "blocks.0.conv has no channel 3 in this atlas."),
        ("nowhere:3", "No layer is called “nowhere”."),
        ("<img src=x>", "Nothing is called “<img src=x>”."),
    ):
        box.fill(asked)
        page.locator("#results p", has_text=answer).wait_for()
    page.keyboard.press("Escape")
    assert not page.locator("#results").is_visible() and page.url == base + METHOD


def test_order(visit):
    page = visit(EVEN)
    channels = [str(c) for c in LAYERS[1][3]]
    assert shown(page) == channels
    data = page.evaluate("ATLAS.need('blocks.0.conv/grid')")
    for key in ("ratio", "max", "sparsity"):
        for option, sign in ((f"{key}-down", -1), (f"{key}-up", 1)):
            page.locator("#sort").select_option(option)
            rank = dict(zip(channels, data[key], strict=True))
            assert shown(page) == sorted(channels, key=lambda c, rank=rank, sign=sign: (sign * rank[c], int(c)))
    titles = dict(page.locator("#measure option").evaluate_all("all => all.map(e => [e.value, e.textContent])"))
    offered = [metric for metric in GRID_METRICS if metric.name in titles]
    assert len(offered) > 5 and all(titles[metric.name] == metric.title for metric in offered)
    page.locator("#sort").select_option("status")
    assert shown(page)[-1] == "2"
    page.locator("#sort").select_option("label")
    words = [data["labels"][i] if i >= 0 else "\uffff" for i in data["label"]]  # units without a label are last
    assert shown(page) == sorted(channels, key=lambda c: (words[channels.index(c)], int(c)))
    page.locator("#sort").select_option("channel")
    assert shown(page) == channels


def test_units_without_a_ratio_come_last(visit):
    page = visit(STEM)
    for option in ("ratio-down", "ratio-up"):
        page.locator("#sort").select_option(option)
        assert shown(page)[-1] == "3"


def test_filter(visit):
    page = visit(EVEN)
    box = page.get_by_label("Find")
    box.fill("3")
    assert shown(page) == ["30", "32", "34", "36", "38"]
    assert page.locator("#count").inner_text() == "5 of 20"
    box.fill("goldfish")
    assert shown(page) == ["2", "12", "22", "32"]
    box.fill("nothing like it")
    assert shown(page) == []
    box.fill("")
    page.locator("#status").select_option("failed")
    assert shown(page) == ["2"]
    page.locator("#status").select_option("")
    page.locator("#measure").select_option("max")
    largest = page.evaluate("ATLAS.need('blocks.0.conv/grid').then(columns => columns.max)")
    page.locator("#from").fill(str(sorted(largest)[10]))
    assert len(shown(page)) == 10
    page.locator("#to").fill(str(sorted(largest)[12]))
    assert len(shown(page)) == 3


def test_size(visit):
    page = visit(EVEN)
    width = "document.querySelector('.tile .pic').getBoundingClientRect().width"
    before = page.evaluate(width)
    page.get_by_label("Size").fill("200")
    assert page.evaluate(width) > 1.5 * before
    page.reload()
    page.wait_for_function("() => document.body?.dataset.ready")
    assert page.evaluate(width) > 1.5 * before


def test_keys(visit, base):
    page = visit(HOME)
    page.keyboard.press("]")
    page.wait_for_url(base + STEM)
    page.keyboard.press("]")
    page.wait_for_url(base + EVEN)
    page.wait_for_function("() => document.body?.dataset.ready")
    for key, channel in (("Right", "0"), ("Right", "2"), ("Right", "4"), ("Left", "2")):
        page.keyboard.press("Arrow" + key)
        assert page.evaluate("document.activeElement.dataset.channel") == channel
    page.keyboard.press("Enter")
    arrives(page, "blocks.0.conv:2")
    for key, name in (
        ("Right", "blocks.0.conv:4"), ("Left", "blocks.0.conv:2"), ("Left", "blocks.0.conv:0"),
        ("Down", "blocks.1.conv:2"),
        ("Right", "blocks.1.conv:5"), ("Up", "blocks.0.conv:2"), ("Up", "stem:1"),
    ):  # fmt: skip
        page.keyboard.press("Arrow" + key)
        arrives(page, name)
    page.keyboard.press("c")
    assert "stem:1 is pinned" in page.locator("#says").inner_text()
    page.keyboard.press("c")
    assert "stem:1 is no longer pinned" in page.locator("#says").inner_text()
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.get_by_role("button", name="Help").click()
    page.get_by_role("button", name="Close").click()
    for key in ("/", "g"):
        page.keyboard.press(key)
        page.keyboard.type("]?c")
        assert page.locator("#search").input_value().endswith("]?c")
        page.keyboard.press("Escape")
    page.keyboard.press("m")
    page.wait_for_url(base + MAP)
    page.keyboard.press("r")
    page.wait_for_url(lambda url: "unit.html#" in url)


def test_buttons(visit, base):
    page = visit(UNIT)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"]) if base.startswith("http") else None
    page.get_by_role("button", name="Copy link").click()
    page.locator("#says", has_text="Copied the link").wait_for()
    page.get_by_role("button", name="Copy citation").click()
    page.locator("#says", has_text="Copied the citation").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "blocks.0.conv_20.json"
    record = json.loads(Path(download.value.path()).read_text())
    assert record["unit"] == "blocks.0.conv:20" and record["channel"] == 20 and record["photographs"]


def test_map(visit):
    page = visit(MAP)
    page.wait_for_function("() => Number(document.querySelector('#map').dataset.shown) > 20")
    assert page.locator("#map").get_attribute("data-near") == str(sum(len(layer[3]) for layer in LAYERS))
    box = page.get_by_label("Highlight")
    box.fill("goldfish")
    page.wait_for_function("() => document.querySelector('#map-count').textContent.startsWith('7 ')")
    page.locator("#map").scroll_into_view_if_needed()
    spot = page.locator("#map").bounding_box()
    page.mouse.move(spot["x"] + spot["width"] / 2, spot["y"] + spot["height"] / 2)
    page.mouse.wheel(0, -2500)
    page.wait_for_function("() => Number(document.querySelector('#map').dataset.near) < 30")
    page.get_by_role("button", name="Whole map").click()
    page.wait_for_function("() => Number(document.querySelector('#map').dataset.near) > 30")
    page.mouse.move(spot["x"] + 60, spot["y"] + 60)
    page.mouse.down()
    page.mouse.move(spot["x"] + spot["width"] - 20, spot["y"] + 80, steps=3)
    page.mouse.up()
    page.wait_for_function("() => Number(document.querySelector('#map').dataset.near) < 30")
    page.get_by_role("button", name="Whole map").click()
    page.locator("#map").focus()
    page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    page.locator("#map-layer").select_option("4")
    page.wait_for_function("() => Number(document.querySelector('#map').dataset.near) <= 5")
    page.locator("#map-layer").select_option("")
    page.get_by_role("button", name="Whole map").click()
    # A unit under the pointer is named, and a click goes there.
    name = unit_under_pointer(page, spot, range(200, int(spot["width"]) - 100, 20))
    page.mouse.down()
    page.mouse.up()
    page.wait_for_url(lambda url: "unit.html#" in url)
    arrives(page, name)


def test_search_lights_up_the_map(visit, base):
    page = visit(METHOD)
    page.get_by_label("Search", exact=True).fill("tench")
    page.get_by_text("Highlight them on the map").click()
    page.wait_for_url(base + "map.html#q=tench")
    page.wait_for_function("() => document.querySelector('#map-count').textContent.endsWith('units')")


def test_families(visit):
    page = visit(FAMILY)
    page.locator(".card h2 a").click()
    page.wait_for_url("**/families/*")
    page.wait_for_function("() => document.querySelector('.mini').style.backgroundImage")
    assert page.locator(".members li").count() == 4
    assert page.locator(".flag").all_inner_texts() == ["not in this atlas"] * 2
    page.locator(".members a code").first.click()
    arrives(page, "blocks.0.conv:2")


def test_light_and_dark(visit):
    page = visit(HOME)
    ground = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(ground)
    page.get_by_role("button", name="Light or dark theme").click()
    assert page.evaluate(ground) != before
    page.reload()
    assert page.evaluate(ground) != before


@pytest.mark.long
def test_what_is_not_there_is_found(browser, folder):
    """The page that hosts give for what is missing, from any depth, with old names of layers."""
    here = folder / "somewhere/below/site"
    with server(here, 0) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        base = f"http://127.0.0.1:{found.server_port}/"
        window = browser.new_context()
        try:
            for asked, to in (
                ("layers/gone.conv.html", None),
                ("layers/net.blocks.0.conv.html#20", "unit.html#blocks.0.conv:20"),
                ("deep/er/blocks.0.conv:4", "unit.html#blocks.0.conv:4"),
                ("models/x/head/3", "unit.html#head:3"),
                ("layers/net.stem", "layers/stem.html"),
            ):
                page = window.new_page()
                page.goto(base + asked)
                if to is None:
                    page.get_by_text("This atlas has no page at this address. Home page").wait_for()
                    assert "Searching" not in page.locator("body").inner_text()
                    assert page.locator("header a").first.get_attribute("href") == base + "index.html"
                    page.locator("#found a").click()
                    page.wait_for_url(base + "index.html")
                else:
                    page.wait_for_url(base + to)
                page.close()
        finally:
            window.close()
            found.shutdown()
            thread.join()


def test_without_script(visit):
    page = visit(HOME, script=False)
    assert not page.locator(".search").is_visible() and not page.locator(".help-button").is_visible()
    page.locator(".card h3 a").nth(1).click()
    page.wait_for_url("**/blocks.0.conv.html")
    assert not page.locator(".controls").is_visible()
    sheet = page.locator(".contact img")
    assert sheet.count() == 1 and sheet.get_attribute("alt") == "Units 0 to 38 of blocks.0.conv, row by row"


def test_a_shared_address_leads_to_the_unit(visit, base):
    page = visit(f"u/{safe_name('../../x')}/2.html")
    page.wait_for_url(base + "unit.html#../../x:2")
    arrives(page, "../../x:2")


def test_a_shared_address_without_script_shows_the_unit(visit):
    page = visit("u/blocks.0.conv/20.html", script=False)
    assert page.get_by_role("heading").inner_text() == "blocks.0.conv:20"
    assert page.locator("noscript img").count() or page.locator("main img").is_visible()
    assert "feature visualizations" in page.locator("main").inner_text()


def test_a_unit_of_the_wall_leads_to_its_page(visit):
    page = visit(HOME)
    tile = page.locator(".wall a").first
    name = tile.inner_text().replace("\n", "")
    assert tile.bounding_box()["y"] < 700  # on the first screen
    tile.click()
    arrives(page, name)


def test_sixty_layers_are_on_one_screen(browser, tmp_path):
    layers = tuple((f"blocks.{i}.conv", "conv", 8 + i, (0,), 64 >> (i // 15), 3, 16, 3) for i in range(60))
    path = write_atlas(tmp_path / "atlas.h5", layers=layers, pictures=False, examples=False)
    build(path, config=SiteConfig(cards="none"))
    window = browser.new_context(viewport={"width": 1440, "height": 900})
    page = window.new_page()
    page.goto(f"file://{tmp_path}/site/index.html")
    box = page.locator(".diagram").bounding_box()
    assert box["width"] <= 1440 and box["height"] < 900
    sides = page.evaluate("""() => Array.from(document.querySelectorAll(".box .name"), (e) => {
        const box = e.getBoundingClientRect(); return [box.left, box.right, box.width]; })""")
    assert len(sides) == 60 and min(side[0] for side in sides) >= 0 and max(side[1] for side in sides) <= 1440
    # Names do not overlap, and stages are folded.
    assert all(a[1] <= b[0] + 2 for a, b in itertools.pairwise(sides))
    assert page.locator("details.stage").count() == 4 and not page.locator(".card").first.is_visible()
    window.close()
