"""Pages of classes, units in frames of other pages, display images and maps of many units, in a real browser."""

import functools
import http.server
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import test_browser
from test_browser import MAP, Quiet, arrives, nothing_serious, unit_under_pointer
from test_class_index import write_known_effects
from test_site import LABELS, build, write_atlas

from pipeline.site.media import map_tiles
from pipeline.store.hdf5 import write_array
from pipeline.store.reader import open_atlas

browser, base, visit = test_browser.browser, test_browser.base, test_browser.visit
ONE_BASE = pytest.mark.parametrize("base", ["disk"], indirect=True)
UNIT, LARGE = "blocks.1.conv:5", 96


def write_relevant(file: h5py.File) -> None:
    """Of the three units of blocks.1.conv: two images, one, and none; masks are bright in the upper left quarter."""
    mask = np.zeros((3, 2, 4, 4), np.uint8)
    mask[..., :2, :2] = 255
    arrays = {
        "value": np.array([[2.5, 0.5], [1.25, np.nan], [np.nan, np.nan]], np.float32),
        "index": np.array([[3, 7], [2, -1], [-1, -1]], np.int32),
        "y": np.zeros((3, 2), np.int16),
        "x": np.ones((3, 2), np.int16),
        "mask": mask,
    }
    for name, array in arrays.items():
        write_array(file, f"layers/blocks.1.conv/examples/relevant/{name}", array)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """As for the other tests, with a display image of one unit, and a map without room for an image of each unit."""
    served = tmp_path_factory.mktemp("served")
    path = write_atlas(served / "somewhere/below/atlas.h5")
    with h5py.File(path, "r+") as file:
        layer = file["layers/blocks.1.conv"]
        assert isinstance(layer, h5py.Group)
        rendered = layer["render"]
        assert isinstance(rendered, h5py.Group)
        main = min(rendered.values(), key=lambda group: group.attrs["order"])
        target = layer.create_group("render/larger")
        target.attrs.update(dict(main.attrs) | {"preset": "larger", "order": 9, "digest": "5e" * 32})
        target.attrs["display_of"] = main.attrs["preset"]
        images = np.zeros((3, 1, LARGE, LARGE, 1), np.uint8)
        images[1] = 180
        target.create_dataset("images", data=images, chunks=(1, 1, LARGE, LARGE, 1))
        write_array(target, "activation", np.full((3, 1), np.nan, np.float32))
        write_array(target, "status", np.array([["missing"], ["limit"], ["missing"]], object))
        write_known_effects(file)
        write_relevant(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(map_tiles, "MANY", 10)
        build(path)
    return served


@ONE_BASE
@pytest.mark.long
def test_a_class_has_its_unit_and_the_units_that_belong_to_it(visit, base, folder):
    page = visit("index.html")
    page.get_by_role("navigation", name="The atlas").get_by_role("link", name="Classes").click()
    page.wait_for_url(base + "class.html")
    page.locator(".classes a").first.wait_for()
    assert page.locator(".classes a").all_inner_texts() == sorted(LABELS, key=str.lower)
    page.keyboard.press("/")
    page.keyboard.type("goldfish")
    page.keyboard.press("Enter")
    page.wait_for_url(base + "class.html#goldfish")
    page.wait_for_function("() => document.body?.dataset.ready === 'goldfish'")
    assert page.locator("h1").inner_text() == "goldfish"
    assert page.locator(".class-images a").first.get_attribute("href").endswith("unit.html#head:1")
    with open_atlas(folder / "somewhere/below/atlas.h5") as atlas:
        number = list(atlas.dataset_labels).index("goldfish")
        for layer in atlas:
            labels = layer.labels()
            assert labels is not None
            rows = np.flatnonzero(labels.best == number)
            expected = [str(layer.channels[row]) for row in rows[np.argsort(-labels.auroc[rows], kind="stable")]]
            section = page.locator(".class-units .class-layer").filter(
                has=page.get_by_role("link", name=layer.name, exact=True)
            )
            assert section.locator(".near b").all_inner_texts() == expected
    assert page.locator(".class-effects .near b").all_inner_texts() == ["3", "1"]
    assert page.locator(".class-effects .near span:last-child").all_inner_texts() == ["−0.700", "+0.500"]
    nothing_serious(page, "a class")
    page.locator(".near").first.click()
    page.wait_for_url(lambda url: "unit.html#" in url)
    page.go_back()
    page.evaluate("location.hash = 'nothing'")
    page.get_by_text("This atlas has no such class.").wait_for()
    page.evaluate("location.hash = 'tench'")  # both inputs of blocks.0.conv belong to it
    page.wait_for_function("() => document.body?.dataset.ready === 'tench'")
    assert page.locator(".class-connections .weight").all_inner_texts() == ["−1.25 →"] * 4 + ["+0.750 →"] * 4
    assert page.locator(".class-connections h3").all_inner_texts() == ["stem → blocks.0.conv"]
    nothing_serious(page, "a class with connections")


@ONE_BASE
def test_images_that_use_a_unit_and_their_masks(visit):
    page = visit("unit.html#blocks.1.conv:2")
    arrives(page, "blocks.1.conv:2")
    frames = page.locator(".relevant .frame")
    assert frames.count() == 2
    captions = page.locator(".relevant figcaption data").evaluate_all("them => them.map((it) => it.value)")
    assert captions == ["2.5", "0.5"]
    # The veil over the input of the network: clear in the upper left quarter, dark elsewhere.
    alphas = frames.first.locator("canvas").evaluate(
        "it => [...it.getContext('2d').getImageData(0, 0, it.width, it.height).data].filter((_, i) => i % 4 === 3)"
    )
    assert len(alphas) == 16 and alphas[0] == 0 and alphas[-1] > 150
    frames.first.click()
    dialog = page.locator("dialog[open]")
    dialog.locator("canvas.heat").wait_for()
    assert "relevance" in dialog.inner_text() and "2.5" in dialog.inner_text()
    nothing_serious(page, "an image that uses a unit")
    page.keyboard.press("Escape")
    page.evaluate("location.hash = 'blocks.1.conv:7'")
    arrives(page, "blocks.1.conv:7")
    assert not page.locator(".relevant").count()


@ONE_BASE
def test_a_display_image_stands_beside_the_measured_one(visit, folder):
    page = visit(f"unit.html#{UNIT}")
    arrives(page, UNIT)
    figure = page.locator("figure.display")
    assert f"{LARGE} × {LARGE} px; measures belong to the image of" in figure.inner_text()
    figure.locator("button").focus()
    page.keyboard.press("Enter")
    assert page.locator("#lightbox-title").inner_text().endswith("display image")
    assert (
        f"{LARGE} × {LARGE} px" in page.locator("#lightbox dl").inner_text()
        and "5e5e5e" in page.locator("#lightbox dl").inner_text()
    )
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.image").startswith("display/")
    arrives(visit("unit.html#blocks.1.conv:2"), "blocks.1.conv:2")
    assert page.locator("figure.display").count() == 1
    with open_atlas(folder / "somewhere/below/atlas.h5") as atlas:
        assert "larger" not in set(atlas.units()["preset"])


@pytest.mark.parametrize("base", ["web"], indirect=True)
def test_a_unit_is_shown_in_a_frame_of_a_page_of_another_host(browser, base, folder, tmp_path):
    window = browser.new_context(viewport={"width": 700, "height": 600})
    page = window.new_page()
    page.goto(f"{base}unit.html#{UNIT}")
    arrives(page, UNIT)
    page.evaluate(
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (t) => { window.copied = t; }}})"
    )
    page.get_by_role("button", name="Copy embed code").click()
    code = page.evaluate("window.copied")
    assert code.startswith("<iframe src=") and f'title="{UNIT} of tiny"' in code
    (tmp_path / "page.html").write_text(f"<!doctype html><title>Other</title>{code}")
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        page.goto(f"http://localhost:{server.server_port}/page.html")
        frame = page.frame_locator("iframe")
        frame.locator("h1 a").wait_for()
        assert frame.locator("h1 a").inner_text() == UNIT
        assert frame.locator(".visualization .pic").count() == 1
        with open_atlas(folder / "somewhere/below/atlas.h5") as atlas:
            best = atlas["blocks.1.conv"].examples("max")
        assert best is not None and frame.locator(".example").count() == (best.index[1, :4] >= 0).sum()
        assert not frame.locator(".bar, footer").filter(visible=True).count()
        with page.expect_popup() as opened:
            frame.locator("h1 a").click()
        arrives(opened.value, UNIT)
        server.shutdown()
        thread.join()
    window.close()


@ONE_BASE
def test_a_map_of_many_units_has_an_image_at_every_zoom(visit):
    page = visit(MAP)
    # The page draws tiles for more units than `MANY`; make the atlas of the test one of them.
    shown = "() => Number(document.querySelector('#map').dataset.tiled) > 5"
    page.wait_for_function(shown)
    first = page.evaluate("document.querySelector('#map').dataset.level")
    for _ in range(3):
        page.locator("#map").focus()
        page.keyboard.press("+")
    page.wait_for_function(f"() => document.querySelector('#map').dataset.level > {first}")
    # The unit of an image is the one that a click on it opens.
    page.get_by_role("button", name="Whole map").click()
    page.wait_for_function(shown)
    spot = page.locator("#map").bounding_box()
    name = unit_under_pointer(page, spot, range(60, int(spot["width"]) - 60, 12))
    page.mouse.down()
    page.mouse.up()
    arrives(page, name)


@ONE_BASE
@pytest.mark.long
def test_the_dialog_of_a_display_image_is_accessible(visit):
    page = visit(f"unit.html#{UNIT}&image=display/distill")
    arrives(page, UNIT)
    nothing_serious(page, "display image")
