"""The site in a real browser, from disk and from a sub-folder of a web host."""

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_site import LAYERS, build, write_atlas

from pipeline.shards import safe

sync_api = pytest.importorskip("playwright.sync_api")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
HOME = "index.html"
STEM, EVEN, GREY, HOSTILE, HEAD = (f"layers/{safe(layer[0])}.html" for layer in LAYERS)


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
    build(write_atlas(served / "somewhere/below/atlas.h5"))
    return served


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module", params=["disk", "web"])
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
        if not asked.url.startswith((base, "data:")):
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
        return page

    yield go
    for window in windows:
        window.close()
    assert not faults


def shown(page: Any, selector: str) -> list[str]:
    """Channels of the elements that are not hidden, in order."""
    return page.eval_on_selector_all(
        selector, "all => all.filter(e => e.offsetParent).map(e => e.dataset.channel || e.id)"
    )


def target(page: Any) -> str | None:
    """The unit that the address points at, if the reader can see its heading."""
    page.wait_for_timeout(100)
    return page.evaluate(
        """() => {
            const found = document.querySelector("article:target");
            const top = found ? found.querySelector("h3").getBoundingClientRect().top : -1;
            const bar = document.querySelector(".bar").getBoundingClientRect().bottom;
            return top >= bar && top < innerHeight ? found.id : null;
        }"""
    )


@pytest.mark.parametrize("width", [360, 1440])
def test_everything_fits_and_loads(visit, width):
    for to in (HOME, STEM, EVEN + "#20", GREY, HOSTILE, HEAD):
        page = visit(to, width)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), to
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
            assert min(ground) > 200 if scheme == "light" else max(ground) < 60
        page.evaluate("for (const image of document.images) image.loading = 'eager'")
        page.evaluate("Promise.all(Array.from(document.images, (image) => image.decode()))")
        page.context.close()


def test_from_home_to_a_unit(visit):
    page = visit(HOME)
    page.locator(".card h3 a").nth(1).click()
    page.wait_for_url("**/blocks.0.conv.html")
    page.locator(".grid li[data-channel='20'] a").click()
    assert target(page) == "20"
    page.locator("article:target").get_by_role("link", name="what the numbers mean").click()
    page.go_back()
    assert target(page) == "20"


@pytest.mark.parametrize("channel", ["0", "20", "38"])
@pytest.mark.parametrize("width", [360, 1440])
def test_a_link_to_a_unit_leads_there(visit, channel, width):
    assert target(visit(f"{EVEN}#{channel}", width)) == channel


@pytest.mark.parametrize(
    ("start", "asked", "to"),
    [
        (HOME, "blocks.0.conv:38", f"{EVEN}#38"),
        (HOME, "0.conv:4", f"{EVEN}#4"),
        (STEM, " STEM : 5 ", f"{STEM}#5"),
        (STEM, "head", HEAD),
        (EVEN, "10", f"{EVEN}#10"),
        (HOSTILE, "goldfish", f"{HEAD}#1"),
        (HEAD, "../../x:2", f"{HOSTILE}#2"),
    ],
)
def test_jump(visit, base, start, asked, to):
    page = visit(start)
    page.get_by_label("Go to").fill(asked)
    page.keyboard.press("Enter")
    page.wait_for_url(base + to)


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("conv:4", "2 layers match: blocks.0.conv, blocks.1.conv"),
        ("blocks.0.conv:3", "blocks.0.conv has no channel 3 in this atlas."),
        ("nowhere:3", "No layer is called “nowhere”."),
        ("<img src=x>", "No layer is called “<img src=x>”."),
    ],
)
def test_jump_says_why_not(visit, base, asked, answer):
    page = visit(HOME)
    page.get_by_label("Go to").fill(asked)
    page.keyboard.press("Enter")
    assert page.locator("#jump-says").inner_text() == answer
    assert page.url == base + HOME


def test_order(visit):
    page = visit(EVEN)
    channels = [str(c) for c in LAYERS[1][3]]
    assert shown(page, ".grid li") == shown(page, "article") == channels
    ratios = page.eval_on_selector_all(".grid li", "all => all.map(e => [e.dataset.channel, +e.dataset.ratio])")
    for option, sign in (("ratio-down", -1), ("ratio-up", 1)):
        page.get_by_label("Order").select_option(option)
        expected = [c for c, _ in sorted(ratios, key=lambda pair: sign * pair[1])]
        assert shown(page, ".grid li") == shown(page, "article") == expected != channels
    page.get_by_label("Order").select_option("channel")
    assert shown(page, "article") == channels


def test_units_without_a_ratio_come_last(visit):
    page = visit(STEM)
    for option in ("ratio-down", "ratio-up"):
        page.get_by_label("Order").select_option(option)
        assert shown(page, ".grid li")[-1] == "3"


def test_filter(visit):
    page = visit(EVEN)
    box = page.get_by_label("Find")
    box.fill("3")
    assert shown(page, ".grid li") == shown(page, "article") == ["30", "32", "34", "36", "38"]
    assert page.locator("#count").inner_text() == "5 of 20"
    box.fill("FAILED")
    assert shown(page, "article") == ["2"]
    box.fill("nothing like it")
    assert shown(page, "article") == []
    # A link must lead to its unit all the same.
    page.evaluate("location.hash = '#20'")
    assert target(page) == "20"
    assert box.input_value() == "" and len(shown(page, "article")) == 20


def test_filter_by_class(visit):
    page = visit(HEAD + "#0")
    page.get_by_label("Find").fill("onerror")
    assert "2" in shown(page, "article")


def test_size(visit):
    page = visit(EVEN)
    width = "document.querySelector('.grid img').getBoundingClientRect().width"
    before = page.evaluate(width)
    page.get_by_label("Size").fill("200")
    assert page.evaluate(width) > 1.5 * before
    page.reload()
    assert page.evaluate(width) > 1.5 * before


def test_keys(visit, base):
    page = visit(HOME)
    page.keyboard.press("]")
    page.wait_for_url(base + STEM)
    page.keyboard.press("]")
    page.wait_for_url(base + EVEN)
    for key, channel in (("Right", "0"), ("Right", "2"), ("Right", "4"), ("Left", "2"), ("Left", "0"), ("Left", "0")):
        page.keyboard.press("Arrow" + key)
        assert target(page) == channel
    page.get_by_label("Order").select_option("ratio-up")
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    order = shown(page, "article")
    assert target(page) == order[min(order.index("0") + 1, len(order) - 1)]
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.get_by_role("button", name="Help").click()
    page.get_by_role("button", name="Close").click()
    assert not page.locator("#help").is_visible()
    page.keyboard.press("/")
    page.keyboard.type("]?")
    assert page.get_by_label("Go to").input_value() == "]?"
    page.keyboard.press("Tab")
    page.locator("h1").click()
    page.keyboard.press("[")
    page.wait_for_url(base + STEM)


def test_without_script(visit):
    page = visit(HOME, script=False)
    assert not page.locator(".jump").is_visible() and not page.locator(".help-button").is_visible()
    page.locator(".card h3 a").nth(1).click()
    page.wait_for_url("**/blocks.0.conv.html")
    assert not page.locator(".controls").is_visible()
    assert page.locator("article").count() == 20
    page.locator(".grid li a").nth(10).click()
    page.wait_for_url("**/blocks.0.conv.html#20")
