"""Every kind of page in Chromium and in Firefox, at several widths and in all modes of reading."""

import functools
import http.server
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import pytest
import test_browser
from firefox import DARK, FIREFOX, FORCED_COLORS, LIGHT, NO_SCRIPT, Firefox
from PIL import Image
from test_browser import Quiet, axe
from test_class_index import write_known_effects
from test_more_pages import write_relevant
from test_site import FAMILIES, SMALL, build, write_atlas

from pipeline.compare import open_runs
from pipeline.compare.build import build as build_comparison

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "benches"))

import reader_tasks

browser = test_browser.browser
WIDTHS = (360, 768, 1440)
UNIT = "blocks.0.conv:20"
READY = "document.body.dataset.ready"
# Each kind of page, below the folder that is served, and what is true once its script has run.
PAGES = {
    "home": ("site/index.html", "document.querySelectorAll('.wall img').length"),
    "layer": ("site/layers/blocks.0.conv.html", READY),
    "ordered layer": ("site/layers/blocks.0.conv.html#sort=max-down&find=dish", READY),
    "unit": (f"site/unit.html#{UNIT}", READY),
    "unit with presets": ("site/unit.html#blocks.1.conv:2", READY),
    "image of a unit": (
        f"site/unit.html#{UNIT}&image=example/max/1&view=heat",
        "document.querySelector('#lightbox canvas')",
    ),
    "unknown unit": ("site/unit.html#stem:99", "document.querySelector('#unit .lead')"),
    "classes": ("site/class.html", READY),
    "class": ("site/class.html#goldfish", READY),
    "map": ("site/map.html", READY),
    "families": ("site/families.html", "document.querySelector('.mini').style.backgroundImage"),
    "family": ("site/families/FAMILY.html", "document.querySelector('.mini').style.backgroundImage"),
    "method": ("site/method.html", "document.querySelector('h1')"),
    "pinned": (f"site/pinned.html#{UNIT},stem:1", READY),
    "embedded unit": (f"site/embed.html#{UNIT}", READY),
    "unit, for sharing": ("site/u/blocks.0.conv/20.html", f"{READY} === '{UNIT}'"),
    "missing": ("site/404.html", "document.querySelector('#found a')"),
    "comparison": ("compare/index.html", READY),
    "layer, compared": ("compare/layers/blocks.0.conv.html", READY),
    "unit, compared": (f"compare/unit.html#{UNIT}", READY),
}
# Those that differ most in their parts; the others of the default suite are in the long one.
FEW = ("home", "layer", "unit", "class", "map", "method", "comparison")


class Window(Protocol):
    """A page in one of the browsers."""

    messages: list[str]

    def goto(self, url: str) -> None: ...
    def evaluate(self, expression: str) -> Any: ...
    def resize(self, width: int, height: int = 800) -> None: ...
    def tab(self) -> None: ...
    def pdf(self) -> bytes: ...


class Chromium:
    """A page in Chromium, as `Firefox` has it."""

    def __init__(self, page: Any) -> None:
        self.messages: list[str] = []
        self.page = page
        page.on("console", lambda m: self.messages.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: self.messages.append(f"error: {e}"))

    def goto(self, url: str) -> None:
        self.page.goto("about:blank")
        self.page.goto(url)

    def evaluate(self, expression: str) -> Any:
        return self.page.evaluate(expression)

    def resize(self, width: int, height: int = 800) -> None:
        self.page.set_viewport_size({"width": width, "height": height})

    def tab(self) -> None:
        self.page.keyboard.press("Tab")

    def pdf(self) -> bytes:
        return self.page.pdf()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What a web host would serve: a site and a comparison, in sub-folders."""
    below = tmp_path_factory.mktemp("served") / "somewhere/below"
    path = write_atlas(below / "atlas.h5")
    with h5py.File(path, "r+") as file:
        write_known_effects(file)
        write_relevant(file)
    (below / "families.yaml").write_text(FAMILIES)
    build(path)
    runs = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", 0), ("other", 90)):
        (runs / name).mkdir()
        write_atlas(runs / name / "atlas.h5", seed=seed)
    with open_runs(["one", "other"], [], runs) as inputs:
        build_comparison(inputs, below / "compare", SMALL)
    return below


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder; yield its address."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def disk(folder) -> str:
    return f"{folder.as_uri()}/"


@pytest.fixture(scope="module")
def web(folder) -> Iterator[str]:
    with served(folder.parents[1]) as address:
        yield f"{address}somewhere/below/"


Opening = Callable[..., AbstractContextManager[Window]]


@pytest.fixture
def chromium(browser) -> Opening:
    @contextmanager
    def opened(script: bool = True, **media: str) -> Iterator[Chromium]:
        context = browser.new_context(java_script_enabled=script)
        page = context.new_page()
        page.emulate_media(**media)
        yield Chromium(page)
        context.close()

    return opened


@pytest.fixture
def firefox(tmp_path) -> Callable[..., Firefox]:
    pytest.importorskip("aiohttp")
    if FIREFOX is None:
        message = "no Firefox on this machine: `apt-get install firefox-esr`"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return lambda preferences: Firefox(tmp_path / "profile", preferences)


def address(folder: Path, base: str, kind: str) -> str:
    name = next((folder / "site/families").glob("*.html")).stem
    return base + PAGES[kind][0].replace("FAMILY", name)


def open_page(window: Window, url: str, there: str) -> None:
    """Open a page and wait for its script."""
    window.goto(url)
    script = f"""new Promise((done) => {{ const start = Date.now(); const look = () => {{
        if (document.body && ({there})) done(true); else if (Date.now() - start > 15000) done(false);
        else setTimeout(look, 20); }}; look(); }})"""
    for _ in range(3):  # a page that leads to another one takes the promise with it
        try:
            assert window.evaluate(script), f"{url} is not drawn"
            return
        except Exception as error:
            if "context" not in str(error) and "discarded" not in str(error):
                raise
    raise AssertionError(f"{url} is not drawn")


def fits(window: Window, widths: Sequence[int] = WIDTHS) -> list[str]:
    """Return the widths at which a page scrolls sideways."""
    faults = []
    for width in widths:
        window.resize(width)
        wide = window.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        if wide[0] > wide[1]:
            faults.append(f"{wide[0]} of {wide[1]} pixels at a width of {width}")
    return faults


def violations(window: Window, rules: str = "") -> list[str]:
    """Return what axe-core finds on a page as it stands."""
    if window.evaluate("typeof axe") == "undefined":
        window.evaluate(
            "(() => {" + (Path(axe.__file__).parent / "axe.min.js").read_text() + "; window.axe = axe; })()"
        )
    found = window.evaluate(f"axe.run(document, {{preload: false{rules}}}).then((r) => r.violations)")
    return [json.dumps([v["id"], v["impact"], *(n["html"][:120] for n in v["nodes"][:3])]) for v in found]


TABBABLE = """Array.from((document.querySelector('dialog[open]') || document)
    .querySelectorAll('a[href], button, input, select, summary, [tabindex="0"]'))
    .filter((e) => e.tabIndex >= 0 && !e.disabled && e.checkVisibility({ visibilityProperty: true })
        && !(e.type === 'radio' && !e.checked) && !e.closest('#says, details:not([open]) > :not(summary)'))"""
RING = """(() => { const all = window.tabbable, e = document.activeElement;
    const shown = e && e.type === 'radio' ? e.nextElementSibling : e;
    const style = shown && getComputedStyle(shown), child = e && e.querySelector && e.querySelector('rect');
    const ringed = style && (style.outlineStyle !== 'none' || (child && getComputedStyle(child).stroke !== 'none'));
    return [all.indexOf(e), Boolean(ringed), e ? e.outerHTML.slice(0, 120) : '']; })()"""


def keyboard(window: Window) -> list[str]:
    """Return what the tabulator key does not reach, or reaches without a visible mark."""
    window.evaluate("(() => { window.tabbable = " + TABBABLE + "; document.activeElement?.blur(); scrollTo(0, 0); })()")
    count = window.evaluate("window.tabbable.length")
    reached: set[int] = set()
    faults = [] if count else ["nothing to reach"]
    # Sections that are filled when they come near, such as similar units, add more on the way.
    for _ in range(2 * count + 40):
        window.tab()
        at, ringed, text = window.evaluate(RING)
        if at >= 0 and at not in reached and not ringed:
            faults.append(f"no ring around {text}")
        reached.add(at)
        if len(reached - {-1}) == count:
            break
    for missed in sorted(set(range(count)) - reached)[:5]:
        faults.append(f"not reached: {window.evaluate(f'window.tabbable[{missed}].outerHTML.slice(0, 120)')}")
    return faults


def checked(
    window: Window, folder: Path, base: str, kinds: Sequence[str], look: Callable[[Window], list[str]]
) -> list[str]:
    """Return the faults that `look` finds on the pages, and what the browser says."""
    faults = []
    for kind in kinds:
        window.resize(1280)
        open_page(window, address(folder, base, kind), PAGES[kind][1])
        faults += [f"{kind}: {fault}" for fault in look(window)]
    # Without `site.url`, the page of what is missing looks for the root of the site in all folders above it.
    expected = ("ERR_FILE_NOT_FOUND", "404 (File not found)", "NS_ERROR_FILE_NOT_FOUND")
    return faults + [m for m in window.messages if "missing" not in kinds or not any(e in m for e in expected)]


def none(faults: Sequence[str]) -> None:
    """Fail with all faults, one a line."""
    assert not faults, "\n" + "\n".join(faults)


def printed(window: Window) -> list[str]:
    """Return what is wrong with a page on paper."""
    hidden = "['.bar', '.controls', '.actions', 'footer'].filter((s) => document.querySelector(s)?.checkVisibility())"
    faults = [f"{control} is printed" for control in window.evaluate(hidden)]
    return faults + ([] if len(window.pdf()) > 5_000 else ["hardly anything is printed"])


def without_script(window: Window, folder: Path, base: str) -> list[str]:
    """Return pages that show readers without JavaScript neither content nor a way on."""
    faults = []
    for kind in PAGES:
        window.goto(address(folder, base, kind))
        text, links = window.evaluate(
            "[document.querySelector('main').innerText.length, document.querySelectorAll('main a, header a').length]"
        )
        if text < 15 or not links:
            faults.append(f"{kind}: {text} characters, {links} links")
        faults += [f"{kind}: {fault}" for fault in fits(window, (360,))]
        dead = "Array.from(document.querySelectorAll('button, form')).filter((e) => e.checkVisibility()).length"
        if window.evaluate(dead):
            faults.append(f"{kind}: controls that do nothing")
    return faults


# ------------------------------------------------------------------------------------------------- Chromium


KINDS = [FEW, pytest.param([kind for kind in PAGES if kind not in FEW], marks=pytest.mark.long)]


@pytest.mark.parametrize("kinds", KINDS, ids=["few", "others"])
@pytest.mark.long
def test_pages_fit_and_are_accessible_in_chromium(chromium, folder, disk, kinds):
    with chromium() as window:
        none(checked(window, folder, disk, kinds, lambda w: fits(w) + violations(w) + keyboard(w)))


@pytest.mark.long
def test_pages_in_the_dark_over_http_in_chromium(chromium, folder, web):
    contrast = functools.partial(violations, rules=", runOnly: ['color-contrast']")
    with chromium(color_scheme="dark") as window:
        none(checked(window, folder, web, list(PAGES), lambda w: fits(w, (360,)) + contrast(w)))


def test_results_of_a_search_are_accessible(chromium, folder, disk):
    with chromium() as window:
        open_page(window, address(folder, disk, "home"), PAGES["home"][1])
        page = window.page
        page.get_by_label("Search", exact=True).fill("goldfish")
        page.locator("#results [role=option]").first.wait_for()
        none(violations(window))
        # Units are grouped by layer, and counted.
        groups = page.locator("#results [role=group]").evaluate_all("all => all.map((e) => e.ariaLabel)")
        assert groups == ["blocks.0.conv", "blocks.1.conv", "../../x", "head"]
        assert "7 units in 4 layers" in page.locator("#results").inner_text()


def test_colors_that_say_something_are_told_apart_with_deuteranopia(chromium, folder, disk):
    """What the browser draws as a reader without green receptors sees it."""

    def colors(window: Chromium, selector: str) -> np.ndarray:
        found = []
        for element in window.page.locator(selector).all():
            with Image.open(io.BytesIO(element.screenshot())) as image:
                found.append(np.asarray(image.convert("RGB")).reshape(-1, 3).astype(float))
        return np.stack([part[len(part) // 2] for part in found])

    with chromium() as window:
        session = window.page.context.new_cdp_session(window.page)
        session.send("Emulation.setEmulatedVisionDeficiency", {"type": "deuteranopia"})
        open_page(window, address(folder, disk, "image of a unit"), PAGES["image of a unit"][1])
        bar = window.page.locator(".color-scale canvas")
        with Image.open(io.BytesIO(bar.screenshot())) as image:
            row = np.asarray(image.convert("RGB")).astype(float)[image.height // 2]
        low, high = row[2], row[-3]
        assert np.abs(low - high).max() > 60
        # Contenders of a comparison.
        open_page(window, address(folder, disk, "comparison"), PAGES["comparison"][1])
        first, second = colors(window, "#numbers thead .swatch:visible")[:2]
        assert np.abs(first - second).max() > 60


@pytest.mark.long
def test_pages_in_forced_colors_and_on_paper_in_chromium(chromium, folder, disk):
    with chromium(forced_colors="active") as window:
        none(checked(window, folder, disk, list(PAGES), lambda w: fits(w, (360,)) + keyboard(w)))
    with chromium(media="print") as window:
        kinds = [kind for kind in PAGES if kind != "image of a unit"]
        none(checked(window, folder, disk, kinds, printed))


def test_pages_without_script_in_chromium(chromium, folder, disk):
    with chromium(script=False) as window:
        none(without_script(window, folder, disk))


# -------------------------------------------------------------------------------------------------- Firefox


@pytest.mark.long
def test_every_page_fits_and_has_its_keyboard_in_firefox(firefox, folder, web):
    with firefox(LIGHT) as window:
        none(checked(window, folder, web, list(PAGES), lambda w: fits(w) + keyboard(w)))


@pytest.mark.long
def test_every_page_is_drawn_from_disk_and_accessible_in_firefox(firefox, folder, disk):
    with firefox(LIGHT) as window:
        none(checked(window, folder, disk, FEW, violations))
        none(checked(window, folder, disk, [kind for kind in PAGES if kind not in FEW], lambda w: fits(w, (360,))))


@pytest.mark.long
@pytest.mark.parametrize("preferences", [DARK, FORCED_COLORS], ids=["dark", "forced colors"])
def test_pages_in_the_dark_and_in_forced_colors_in_firefox(firefox, folder, disk, preferences):
    def look(window: Window) -> list[str]:
        # axe-core reads the colors that the page chose, which forced colors replace.
        contrast = violations(window, ", runOnly: ['color-contrast']") if preferences is DARK else []
        return fits(window, (360,)) + contrast

    with firefox(preferences) as window:
        none(checked(window, folder, disk, FEW, look))


@pytest.mark.long
def test_pages_without_script_in_firefox(firefox, folder, disk):
    with firefox(NO_SCRIPT) as window:
        none(without_script(window, folder, disk))


def test_ten_tasks_of_a_reader_take_few_clicks(browser, folder):
    rows = reader_tasks.perform(browser, folder, "tench")
    clicks = [row[1] for row in rows]
    # Find, save, send, least, one thing, effects (of another layer here), where, others, made, right.
    assert clicks == [1, 2, 1, 0, 1, -1, 1, 1, 1, 1], rows
    assert rows[0][2] == len("/tench")
