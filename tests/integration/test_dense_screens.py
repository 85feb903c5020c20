"""Small images on screens of double density: their pixels, and that other screens load nothing more."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_browser import browser  # noqa: F401
from test_site import FAMILIES, build, write_atlas

from pipeline.site.config import SiteConfig

LAYERS = (
    ("stem", "conv", 6, (0, 1, 2, 3, 4, 5), 16, 3, 224, 3),
    ("blocks.0.conv", "conv", 40, tuple(range(0, 40, 2)), 8, 20, 224, 3),
)
# Pixels of the shown piece of a background, and the width that it has on the screen.
PIECES = """async (selector) => {
  const shown = Array.from(document.querySelectorAll(selector)).filter((e) => e.style.backgroundImage).slice(0, 12);
  return Promise.all(shown.map(async (element) => {
    const style = getComputedStyle(element);
    const image = new Image();
    image.src = /url\\("(.*)"\\)/.exec(style.backgroundImage)[1];
    await image.decode();
    return [image.naturalWidth / (parseFloat(style.backgroundSize) / 100), element.clientWidth, image.src];
  }));
}"""
SHARP = "(selector) => document.querySelectorAll(selector + '[data-sharp]').length > 1"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    path = write_atlas(tmp_path_factory.mktemp("dense") / "atlas.h5", layers=LAYERS)
    (path.parent / "families.yaml").write_text(FAMILIES.replace("../../x", "stem"))
    build(path, config=SiteConfig(cards="none"))
    return path.parent / "site"


@pytest.fixture(params=[1, 2])
def page(request, browser) -> Iterator[tuple[Any, int]]:  # noqa: F811
    context = browser.new_context(device_scale_factor=request.param, viewport={"width": 1440, "height": 900})
    yield context.new_page(), request.param
    context.close()


@pytest.mark.parametrize(("address", "selector"), [
    ("layers/stem.html", ".tile .pic"),
    ("unit.html#blocks.0.conv:20", ".similar .near .pic"),
    ("unit.html#blocks.0.conv:20", ".wiring .near .pic"),
    ("families", ".mini[data-unit]"),
    ("index.html", "#options .pic"),
])  # fmt: skip
def test_small_images_have_the_pixels_of_the_screen(page, site, address, selector):
    opened, density = page
    if address.startswith("families"):
        address = f"families/{next((site / 'families').glob('*.html')).name}"
    opened.goto((site / address.partition("#")[0]).as_uri() + address[len(address.partition("#")[0]) :])
    opened.wait_for_function("() => ATLAS.index.layers.length")
    if address == "index.html":
        opened.locator("#search").fill("tench")
        opened.locator(selector).first.wait_for()
    elif address.startswith("unit"):
        opened.locator(selector.split(" ")[0]).first.scroll_into_view_if_needed()
    opened.locator(selector).first.wait_for()
    if density == 2:
        opened.wait_for_function(SHARP, arg=selector)
    else:
        opened.wait_for_timeout(300)
    opened.wait_for_function(
        "selector => Array.from(document.querySelectorAll(selector)).slice(0, 3).every(e => e.style.backgroundImage)",
        arg=selector,
    )
    pieces = opened.evaluate(PIECES, selector)
    assert len(pieces) > 1
    if density == 2:
        assert all(pixels >= 2 * width - 0.5 for pixels, width, _ in pieces)
    else:  # what only screens of high density need is not loaded
        assert not any("/p0-" in source for _, _, source in pieces)
