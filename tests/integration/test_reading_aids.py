"""What helps readers on touch screens, with other color vision, and in forced colors: in a real browser."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_browser
from PIL import Image
from test_browser import MAP, STEM, arrives
from test_site import LABELS

from pipeline.site.pages import STATIC

browser, base, folder, visit = test_browser.browser, test_browser.base, test_browser.folder, test_browser.visit
ONE_BASE = pytest.mark.parametrize("base", ["disk"], indirect=True)
UNIT = "unit.html#blocks.1.conv:5"


@pytest.fixture
def telephone(browser) -> Iterator[Any]:
    """A page on a narrow touch screen."""
    window = browser.new_context(viewport={"width": 390, "height": 700}, has_touch=True, is_mobile=True)
    yield window.new_page()
    window.close()


def gesture(page, *steps: list[tuple[float, float]]) -> None:
    """Fingers go down at the first positions, move to the others, and are lifted."""
    session = page.context.new_cdp_session(page)
    for kind, points in zip(["touchStart"] + ["touchMove"] * (len(steps) - 1), steps, strict=True):
        places = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    session.detach()


@ONE_BASE
@pytest.mark.long
def test_one_finger_scrolls_the_page_and_two_zoom_the_map(telephone, base):
    page = telephone
    page.goto(base + MAP)
    page.wait_for_function("() => Number(document.querySelector('#map').dataset.shown) > 10")
    near = page.locator("#map").get_attribute("data-near")
    page.locator("#map").scroll_into_view_if_needed()
    box = page.locator("#map").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    before = page.evaluate("window.scrollY")
    gesture(page, *([(x, y + 25 * step)] for step in range(9)))
    page.wait_for_function("before => window.scrollY !== before", arg=before)
    assert page.locator("#map").get_attribute("data-near") == near and MAP in page.url
    box = page.locator("#map").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, min(box["y"] + box["height"] / 2, 600)
    gesture(page, *([(x - 20 - 15 * step, y), (x + 20 + 15 * step, y)] for step in range(9)))
    page.wait_for_function(
        "near => Number(document.querySelector('#map').dataset.near) < Number(near)", arg=near, timeout=5000
    )


@ONE_BASE
def test_a_swipe_goes_to_the_next_image(telephone, base):
    page = telephone
    page.goto(base + UNIT + "&image=example/max/1")
    page.locator("#lightbox .lens .pic").wait_for()
    place = page.locator("#lightbox .count").inner_text()
    number, count = place.split(" of ")
    box = page.locator("#lightbox .lens").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    gesture(page, *([(x - 20 * step, y)] for step in range(5)))
    page.get_by_text(f"{int(number) + 1} of {count}").wait_for(timeout=5000)
    gesture(page, *([(x + 20 * step, y)] for step in range(5)))
    page.get_by_text(place).wait_for(timeout=5000)


@ONE_BASE
def test_the_map_names_a_unit_with_its_label(visit):
    page = visit(MAP)
    page.wait_for_function("() => Number(document.querySelector('#map').dataset.shown) > 10")
    page.locator("#map").scroll_into_view_if_needed()
    spot = page.locator("#map").bounding_box()
    assert spot is not None
    page.evaluate("ATLAS.need('search', ATLAS.index.identity)")
    label = "document.querySelector('#map-tip span span')?.textContent"
    found = []
    for x in range(60, int(spot["width"]) - 60, 15):
        page.mouse.move(spot["x"] + x, spot["y"] + spot["height"] / 2)
        found.append(page.evaluate(label))
    assert {text.strip() for text in found if text} & set(LABELS)


@ONE_BASE
@pytest.mark.long
def test_controls_are_large_enough_for_fingers(telephone, base):
    page = telephone
    for address in (STEM, UNIT):
        page.goto(base + address)
        page.wait_for_function("() => document.body?.dataset.ready")
        small = page.evaluate(
            """() => Array.from(document.querySelectorAll(
            'header button, .actions button, select, .toggle label, .places a'))
            .filter(e => e.offsetParent).map(e => [e.textContent.trim(), e.getBoundingClientRect()])
            .filter(([, box]) => box.height < 43.5 || box.width < 43.5).map(([text, box]) => text + ' ' + box.height)"""
        )
        assert small == []
        assert page.evaluate("document.documentElement.scrollWidth <= 390")


@ONE_BASE
def test_colors_of_the_map_have_a_legend_and_rising_lightness(visit):
    page = visit(MAP)
    legend = page.locator("#map-legend")
    assert legend.inner_text().split() == ["stem", "head"]
    gradient = legend.locator(".scale").evaluate("e => getComputedStyle(e).backgroundImage")
    colors = [tuple(map(int, found)) for found in re.findall(r"rgb\((\d+), (\d+), (\d+)\)", gradient)]
    lightness = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in colors]
    steps = [after - before for before, after in itertools.pairwise(lightness)]
    assert len(colors) == 7 and min(steps) > 0.5 * max(steps) > 0


@ONE_BASE
def test_states_are_marked_in_forced_colors(visit):
    page = visit(UNIT)
    arrives(page, "blocks.1.conv:5")
    chosen = page.locator(".toggle input:checked + label")
    outline = "e => getComputedStyle(e).outlineStyle"
    assert chosen.evaluate(outline) == "none"
    page.emulate_media(forced_colors="active")
    assert chosen.evaluate(outline) == "solid"
    others = page.locator(".toggle input:not(:checked) + label")
    assert others.count() and all(outline_ == "none" for outline_ in others.evaluate_all(f"all => all.map({outline})"))


@ONE_BASE
def test_the_chosen_theme_is_there_before_anything_is_drawn(visit):
    page = visit(STEM)
    page.get_by_role("button", name="Light or dark theme").click()
    chosen = page.evaluate("document.documentElement.style.colorScheme")
    assert chosen in ("light", "dark")
    # What the document has when its body begins: scripts that are deferred run after it.
    page.add_init_script(
        """new MutationObserver((_, watcher) => { if (document.body) {
        window.early = document.documentElement.style.colorScheme; watcher.disconnect(); } })
        .observe(document, { childList: true, subtree: true });"""
    )
    page.reload()
    assert page.evaluate("window.early") == chosen


@ONE_BASE
def test_only_similar_units_are_called_similar(visit):
    page = visit(UNIT)
    arrives(page, "blocks.1.conv:5")
    flat = page.evaluate("ATLAS.need('similar/0').then(all => all[6 + 20 + 1])")
    names = page.evaluate("ATLAS.index.layers.map(([name]) => name)")
    expected = [[names[flat[i]], str(flat[i + 1]), f"{flat[i + 2]:.2f}"] for i in range(0, len(flat), 4)]
    assert expected and min(flat[2::4]) >= 0.2 and any(name != "blocks.1.conv" for name, _, _ in expected)
    page.locator(".similar").scroll_into_view_if_needed()
    page.locator(".similar .near").first.wait_for()
    shown = page.locator(".similar .near").evaluate_all(
        "all => all.map(e => Array.from(e.querySelectorAll('small, b, b + span'), part => part.textContent))"
    )
    assert shown == expected


def test_the_icon_for_home_screens_is_a_file_of_the_site(folder):
    site = folder / "somewhere/below/site"
    assert "icon.png" in STATIC
    with Image.open(site / "static/icon.png") as image:
        assert image.size == (180, 180)
    for page in (Path("index.html"), Path("layers/stem.html")):
        root = "../" * (len(page.parts) - 1)
        assert f'<link rel="apple-touch-icon" href="{root}static/icon.png">' in (site / page).read_text()
