"""Do ten tasks of a reader in the browser on a built site, and count the clicks and keys that each takes.

scripts/bench reader_tasks runs/NAME [--word dog]

Each task begins where the one before it ends, the first on the home page, and fails if the page does not show the
answer. Typing a word counts as one key for each character. The answers that stand on the page cost nothing but
scrolling, which is not counted. The browser is Debian's Chromium; the site is served, because pages from disk must
read no pixels.
"""

import argparse
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright

from pipeline.site.hosting.serve import server
from pipeline.store.reader import open_atlas


class Reader:
    """A reader of a site, whose clicks and keys are counted.

    Attributes:
        page: The page that is open.
        clicks: Clicks since the last task.
        keys: Pressed keys since the last task.
    """

    def __init__(self, page: Page, run: Path, word: str) -> None:
        self.page = page
        self.run = run
        self.word = word
        self.clicks = self.keys = 0

    def click(self, selector: str, **having: Any) -> None:
        """Click the first element that a selector finds."""
        self.page.locator(selector, **having).first.click()
        self.clicks += 1

    def press(self, keys: str) -> None:
        """Press a key, or type a word."""
        if len(keys) > 1 and keys[0].isupper():
            self.page.keyboard.press(keys)
            self.keys += 1
        else:
            self.page.keyboard.type(keys)
            self.keys += len(keys)

    def arrives(self) -> str:
        """Wait until a unit is shown; return its name."""
        self.page.wait_for_function("() => document.querySelector('article.unit') && document.body.dataset.ready")
        return str(self.page.locator("article.unit").get_attribute("data-unit-shown"))

    def reads(self, selector: str) -> str:
        """Scroll to a part of the page; return its text."""
        part = self.page.locator(selector).first
        part.scroll_into_view_if_needed()
        return part.inner_text()


def find(reader: Reader) -> str:
    """Find a detector of something by its name."""
    reader.press("/")
    reader.press(reader.word)
    reader.page.locator("#results [role=option]").filter(has=reader.page.locator(".pic")).first.wait_for()
    reader.click("#results [role=option]:has(.pic)")
    return reader.arrives()


def save(reader: Reader) -> str:
    """Save its image."""
    reader.click(".pictures button.zoomed-by")
    with reader.page.expect_download() as download:
        reader.click("#lightbox button", has_text="Save PNG")
    assert download.value.path().read_bytes().startswith(b"\x89PNG")
    reader.page.keyboard.press("Escape")
    return download.value.suggested_filename


def send(reader: Reader) -> str:
    """Send its address to somebody."""
    reader.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    reader.click(".actions button", has_text="Copy link")
    link = str(reader.page.evaluate("navigator.clipboard.readText()"))
    assert link == reader.page.url
    return link.rsplit("/", 1)[1]


def least(reader: Reader) -> str:
    """See what activates it least."""
    text = reader.reads(".examples .of-min")
    return f"{len(text.split())} words below images"


def one_thing(reader: Reader) -> str:
    """Judge whether it responds to one thing: examples of weaker activations."""
    reader.reads(".spectrum")
    reader.page.wait_for_selector(".bins [aria-pressed=true]")
    before = reader.page.locator(".spectrum .row").inner_text()
    reader.click(".bins button >> nth=-2")
    assert reader.page.locator(".spectrum .row").inner_text() != before
    return reader.page.locator(".bins [aria-pressed=true]").inner_text()


def causes(reader: Reader) -> str:
    """See what it causes at the outputs."""
    text = reader.reads(".effects")
    assert "on average" in text
    return text.splitlines()[0]


def where(reader: Reader) -> str:
    """See where in the network it is."""
    reader.click(".opening .neighbours a:not(:has-text('←')):not(:has-text('→'))")
    reader.page.wait_for_function("() => document.querySelector('.grid .tile')")
    text = reader.reads(".facts")
    reader.page.go_back()
    reader.arrives()
    return " ".join(text.split())


def others(reader: Reader) -> str:
    """See which other units are like it, and open one."""
    before = reader.reads("article.unit h1")
    reader.reads(".similar")
    reader.click(".similar a.near")
    reader.page.wait_for_function("text => document.querySelector('article.unit h1').innerText !== text", arg=before)
    return reader.arrives()


def made(reader: Reader) -> str:
    """See how its image was made: settings, seed, digest."""
    digest = reader.reads(".provenance code")
    reader.click(".provenance a", has_text="method")
    reader.page.wait_for_url("**/method.html*")
    assert "Objective" in reader.reads("main")
    reader.page.go_back()
    reader.arrives()
    return digest


def right(reader: Reader) -> str:
    """Check a number: the exact value, against atlas.h5."""
    with reader.page.expect_download() as download:
        reader.click(".actions button", has_text="Download")
    record = json.loads(download.value.path().read_text())
    layer, _, channel = record["unit"].rpartition(":")
    with open_atlas(reader.run) as atlas:
        stored = atlas[layer].stats()["max"][atlas[layer].row(int(channel))]
    assert np.float32(record["stats"]["max"]) == np.float32(stored)
    return f"maximum activation {record['stats']['max']}"


TASKS: tuple[Callable[[Reader], str], ...] = (
    find, save, send, least, one_thing, causes, where, others, made, right,
)  # fmt: skip


def perform(browser: Browser, run: Path, word: str) -> list[tuple[str, int, int, str]]:
    """Do all tasks on the site of a run; return (task, clicks, keys, what was found) of each.

    A task whose answer the atlas does not have, such as effects that were not measured, is not done: its counts are −1.
    """
    rows = []
    with server(run / "site", 0) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.goto(f"http://127.0.0.1:{found.server_port}/index.html")
        page.wait_for_function("() => !document.querySelector('.search').hidden")
        reader = Reader(page, run, word)
        for task in TASKS:
            reader.clicks = reader.keys = 0
            what = (task.__doc__ or "").strip()
            if task is causes and not page.locator(".effects").count():
                rows.append((what, -1, -1, "not measured in this atlas"))
                continue
            answer = task(reader)
            rows.append((what, reader.clicks, reader.keys, answer))
        context.close()
        found.shutdown()
        thread.join()
    return rows


def main() -> int:
    """Do the tasks and print a table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--word", default="dog", help="what the detector of the first task is for")
    options = parser.parse_args()
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        rows = perform(browser, options.run, options.word)
        browser.close()
    sys.stdout.write("| task | clicks | keys | found |\n|---|---|---|---|\n")
    for what, clicks, keys, answer in rows:
        counted = ("—", "—") if clicks < 0 else (clicks, keys)
        sys.stdout.write(f"| {what} | {counted[0]} | {counted[1]} | {answer} |\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
