"""The page of an activation atlas in a real browser: by pointer, by keyboard, by class, and to assistive technology."""

from pathlib import Path

import pytest
import test_browser
from test_activation_atlas_site import LAYER, write_made_atlas
from test_browser import nothing_serious
from test_site import LABELS, build, write_atlas

browser, base, visit = test_browser.browser, test_browser.base, test_browser.visit
ONE_BASE = pytest.mark.parametrize("base", ["disk"], indirect=True)
PAGE = f"activation-atlas/{LAYER}.html"
CURRENT = ".cell[aria-current]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    served = tmp_path_factory.mktemp("served")
    path = write_atlas(served / "somewhere/below/atlas.h5")
    write_made_atlas(path)
    build(path)
    return served


def opened(visit, to: str = PAGE, width: int = 1440):
    page = visit(to, width)
    page.wait_for_function("() => document.body?.dataset.ready")
    return page


def scale_of(page) -> float:
    return float(page.locator(".atlas-view").get_attribute("data-scale"))


@ONE_BASE
def test_the_layer_leads_to_its_atlas_and_a_cell_shows_its_samples(visit, base) -> None:
    page = visit(f"layers/{LAYER}.html")
    page.get_by_role("link", name=f"Open the activation atlas of {LAYER}").click()
    page.wait_for_url(base + PAGE)
    page.wait_for_function("() => document.body?.dataset.ready")
    assert page.get_by_role("heading", level=1).inner_text() == f"Activation atlas of {LAYER}"
    assert page.locator(".cell").count() > 8 and page.locator(".cell.failed").count() == 1
    cell = page.locator(".cell").nth(3)
    cell.click()
    assert page.locator(CURRENT).count() == 1 and page.url.endswith("#3")
    name = cell.get_attribute("aria-label")
    assert name.startswith(page.locator(".atlas-cell h2").inner_text())
    assert page.locator(".nearest li").count() >= 1 and page.locator(".kinds li").count() >= 1
    nothing_serious(page, "an activation atlas")
    page.reload()
    page.wait_for_function("() => document.body?.dataset.ready")
    assert page.locator(CURRENT).get_attribute("aria-label") == name


@ONE_BASE
def test_the_plane_is_moved_and_zoomed(visit) -> None:
    page = opened(visit)
    whole = scale_of(page)
    box = page.locator(".atlas-view").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 200)
    page.mouse.wheel(0, -400)
    page.wait_for_function(f"() => Number(document.querySelector('.atlas-view').dataset.scale) > {whole}")
    before = page.locator(".atlas-plane").bounding_box()
    page.mouse.down()
    page.mouse.move(box["x"] + 380, box["y"] + 230, steps=5)
    page.mouse.up()
    after = page.locator(".atlas-plane").bounding_box()
    assert after["x"] - before["x"] == pytest.approx(80, abs=2) and after["y"] - before["y"] == pytest.approx(30, abs=2)
    assert page.locator(CURRENT).count() == 0  # a drag is no click
    page.get_by_role("button", name="Whole atlas").click()
    assert scale_of(page) == pytest.approx(whole)
    page.get_by_role("button", name="Zoom in").click()
    assert scale_of(page) == pytest.approx(1.4 * whole)
    page.locator("#atlas-sizes").uncheck()
    widths = page.locator(".cell .pic").evaluate_all("all => all.map((it) => it.getBoundingClientRect().width)")
    assert max(widths) == pytest.approx(min(widths))


@ONE_BASE
def test_the_keyboard_goes_from_cell_to_cell(visit) -> None:
    page = opened(visit)
    assert page.locator(".cell[tabindex='0']").count() == 1
    page.locator(".cell[tabindex='0']").focus()
    seen = {page.locator(CURRENT).get_attribute("aria-label")}
    for key in ("ArrowRight", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
        seen.add(page.locator(CURRENT).get_attribute("aria-label"))
        assert page.locator(".cell[tabindex='0']").count() == 1
    assert len(seen) >= 3
    before = scale_of(page)
    page.keyboard.press("+")
    assert scale_of(page) > before
    page.keyboard.press("0")
    assert scale_of(page) == pytest.approx(before)


@ONE_BASE
def test_a_class_colors_its_cells(visit) -> None:
    page = opened(visit)
    labels = page.locator("#atlas-classes option").evaluate_all("all => all.map((it) => it.value)")
    assert labels == sorted(LABELS[:3], key=str.lower)
    page.locator("#atlas-class").fill(labels[0])
    assert page.locator("#atlas-count").inner_text().startswith("12 samples in")
    without = page.locator(".cell.without").count()
    assert 0 < without < page.locator(".cell").count()
    shares = page.locator(".cell").evaluate_all("all => all.map((it) => Number(it.style.getPropertyValue('--share')))")
    assert max(shares) == 1 and sum(share == 0 for share in shares) == without
    nothing_serious(page, "an activation atlas with a class")
    page.locator("#atlas-class").fill("nothing")
    assert page.locator("#atlas-count").inner_text() == "No sample of this class"
    assert page.locator(".cell.without").count() == 0


@ONE_BASE
def test_it_fits_a_phone_and_is_readable_without_scripts(visit) -> None:
    page = opened(visit, width=360)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page = visit(PAGE, script=False)
    assert page.locator("noscript img, main img").first.is_visible()
