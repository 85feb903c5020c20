"""Order and selection of units in addresses, and pinned units, in a real browser."""

import csv
import io

import numpy as np
import pytest
import test_browser
from PIL import Image
from test_browser import arrives, nothing_serious

from pipeline.store.reader import open_atlas

browser, base, folder, visit = test_browser.browser, test_browser.base, test_browser.folder, test_browser.visit
ONE_BASE = pytest.mark.parametrize("base", ["disk"], indirect=True)
LAYER = "layers/blocks.0.conv.html"


def shown(page) -> list[int]:
    return page.eval_on_selector_all(".grid > :not([hidden]) .tile", "all => all.map(e => Number(e.dataset.channel))")


def values(page) -> list[float]:
    return page.eval_on_selector_all(
        ".grid > :not([hidden]) .tile .values data", "all => all.map(e => Number(e.value))"
    )


def ready(page) -> None:
    page.wait_for_function("() => document.body?.dataset.ready === 'yes'")


def expected(folder, low: float) -> list[int]:
    """Channels with a maximum activation of at least `low`, highest first."""
    with open_atlas(folder / "somewhere/below") as atlas:
        layer = atlas["blocks.0.conv"]
        largest = layer.stats()["max"]
        rows = [row for row in np.argsort(-largest, kind="stable") if largest[row] >= low]
        return [layer.channels[row] for row in rows]


def test_order_and_selection_stay_from_the_layer_to_units_and_back(visit, folder):
    page = visit(LAYER)
    ready(page)
    page.locator("#sort").select_option("max-down")
    page.locator("#measure").select_option("max")
    page.locator("#from").fill("8")
    wanted = expected(folder, 8)
    assert 4 < len(wanted) < 20 and shown(page) == wanted
    assert page.url.endswith("#sort=max-down&measure=max&from=8")
    assert values(page) == sorted(values(page), reverse=True) and len(values(page)) == len(wanted)
    assert page.locator("#count").inner_text() == f"{len(wanted)} of 20"
    page.locator(f".tile[data-channel='{wanted[1]}']").click()
    arrives(page, f"blocks.0.conv:{wanted[1]}")
    note = page.locator(".listed").inner_text()
    assert f"2 of {len(wanted)}, by maximum activation, highest first; maximum activation from 8" in note
    page.keyboard.press("ArrowRight")
    arrives(page, f"blocks.0.conv:{wanted[2]}")
    page.keyboard.press("ArrowLeft")
    arrives(page, f"blocks.0.conv:{wanted[1]}")
    page.keyboard.press("ArrowLeft")
    arrives(page, f"blocks.0.conv:{wanted[0]}")
    assert page.locator(".opening .neighbours a").count() == 2  # the layer, and the next unit
    page.locator(".opening .neighbours a", has_text="blocks.0.conv").click()
    ready(page)
    assert shown(page) == wanted and page.locator("#from").input_value() == "8"
    page.go_back()
    arrives(page, f"blocks.0.conv:{wanted[0]}")
    page.get_by_role("link", name="All units in the order of channels").click()
    page.wait_for_function("() => !document.querySelector('.listed')")
    assert page.url.endswith(f"#blocks.0.conv:{wanted[0]}")


@ONE_BASE
@pytest.mark.long
def test_an_address_of_another_layer_and_of_what_does_not_exist(visit):
    page = visit(LAYER + "#sort=gone-up&measure=gone&from=x&find=no-such-label")
    ready(page)
    assert shown(page) == [] and page.locator("#count").inner_text() == "no unit of 20 matches"
    assert page.locator("#sort").input_value() == "channel" and page.locator("#measure").input_value() == ""
    page.locator("#filter").fill("")
    assert shown(page) == list(range(0, 40, 2)) and "#" not in page.url
    # A unit that its listing does not contain: the arrows follow the channels.
    page = visit("unit.html#blocks.0.conv:4&find=3")
    arrives(page, "blocks.0.conv:4")
    assert "not among the units selected" in page.locator(".listed").inner_text()
    page.keyboard.press("ArrowRight")
    arrives(page, "blocks.0.conv:6")


@pytest.mark.long
def test_pinned_units_stand_side_by_side_and_are_saved(visit, base, folder, tmp_path):
    page = visit("unit.html#stem:1")
    arrives(page, "stem:1")
    assert not page.locator(".pins").is_visible()
    page.get_by_role("button", name="Pin", exact=True).click()
    assert page.get_by_role("button", name="Pinned").get_attribute("aria-pressed") == "true"
    page.evaluate("location.hash = '#blocks.1.conv:5'")
    arrives(page, "blocks.1.conv:5")
    page.keyboard.press("c")
    assert page.locator(".pins").inner_text() == "Pinned 2"
    page.locator(".pins").click()
    page.wait_for_function("() => document.body?.dataset.ready === 'pinned 2'")
    assert page.url.endswith("#stem:1,blocks.1.conv:5")
    assert page.locator("table.pinned thead a").all_inner_texts() == ["stem:1", "blocks.1.conv:5"]
    axes = page.locator("table.pinned svg.histogram").evaluate_all("all => all.map(e => e.ariaLabel.split('axis')[1])")
    assert len(axes) == 2 and axes[0] == axes[1]
    with open_atlas(folder / "somewhere/below") as atlas:
        largest = [float(atlas["stem"].stats()["max"][1]), float(atlas["blocks.1.conv"].stats()["max"][1])]
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save numbers (CSV)").click()
    table = list(csv.reader(io.StringIO(saved.value.path().read_text())))
    assert table[0] == ["", "stem:1", "blocks.1.conv:5"]
    numbers = next(row for row in table if row[0] == "maximum activation over the dataset")
    assert [np.float32(text) for text in numbers[1:]] == [np.float32(value) for value in largest]
    if base.startswith("http"):
        with page.expect_download() as saved:
            page.get_by_role("button", name="Save images (PNG)").click()
        with Image.open(saved.value.path()) as image:
            assert image.size == (512, 284)
    else:  # pages from disk must not read pixels
        page.get_by_role("button", name="Save images (PNG)").click()
        page.locator("#says", has_text="disk").wait_for()
    nothing_serious(page, "pinned.html")
    page.get_by_role("button", name="Remove stem:1").click()
    page.wait_for_function("() => document.body?.dataset.ready === 'pinned 1'")
    assert page.locator(".pins").inner_text() == "Pinned 1" and page.url.endswith("#blocks.1.conv:5")


@ONE_BASE
def test_at_most_eight_units_are_pinned_and_unknown_ones_are_named(visit):
    page = visit("unit.html#stem:0")
    arrives(page, "stem:0")
    for channel in range(0, 18, 2):
        page.evaluate("name => ATLAS.pin(name)", f"blocks.0.conv:{channel}")
    assert "8 units are pinned already" in page.locator("#says").inner_text()
    assert page.locator(".pins").inner_text() == "Pinned 8"
    page = visit("pinned.html#stem:3,gone:7,stem:77")
    page.wait_for_function("() => document.body?.dataset.ready === 'pinned 1'")
    assert "Not in this atlas: gone:7, stem:77." in page.locator("#pinned").inner_text()
