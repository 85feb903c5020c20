"""Each kind of page in Firefox, driven by its WebDriver BiDi: it is drawn, and reports no error."""

import asyncio
import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_site import FAMILIES, build, write_atlas

aiohttp = pytest.importorskip("aiohttp")

FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)
# Each page, and what is there once its script has run.
PAGES = (
    ("index.html", "document.querySelectorAll('.wall img').length"),
    ("layers/blocks.0.conv.html", "document.body.dataset.ready"),
    ("unit.html#blocks.0.conv:20", "document.body.dataset.ready"),
    ("pinned.html#blocks.0.conv:20,stem:1", "document.querySelectorAll('#pinned .pic').length"),
    ("embed.html#blocks.0.conv:20", "document.body.dataset.ready"),
    ("class.html#goldfish", "document.body.dataset.ready"),
    ("map.html", "document.body.dataset.ready"),
    ("method.html", "document.querySelector('h1')"),
    ("families.html", "document.querySelector('h1')"),
)
SECONDS = 60


class Session:
    """A session of WebDriver BiDi (https://w3c.github.io/webdriver-bidi/)."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self.entries: list[dict[str, Any]] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the result of a command; log entries that come before it are kept."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await asyncio.wait_for(self._socket.receive_json(), SECONDS)
            if message.get("method") == "log.entryAdded":
                self.entries.append(message["params"])
            elif message.get("id") == number:
                assert message["type"] == "success", message
                return message["result"]

    async def value(self, tab: str, expression: str) -> Any:
        """Return the value of an expression in a tab, a bool."""
        result = await self.call(
            "script.evaluate", expression=f"Boolean({expression})", target={"context": tab}, awaitPromise=False
        )
        return result["result"]["value"]


async def visited(profile: Path, site: Path, pages: Sequence[tuple[str, str]]) -> list[str]:
    """Return what goes wrong on the pages of a site from disk."""
    assert FIREFOX is not None
    arguments = ["--headless", "--no-remote", "--profile", str(profile), "--remote-debugging-port", "0", "about:blank"]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(FIREFOX, *arguments, stderr=pipe, stdout=asyncio.subprocess.DEVNULL)
    try:
        assert process.stderr is not None
        address = None
        while address is None:
            line = await asyncio.wait_for(process.stderr.readline(), SECONDS)
            assert line, "Firefox ended"
            address = re.search(rb"WebDriver BiDi listening on (ws://\S+)", line)
        async with aiohttp.ClientSession() as client, client.ws_connect(f"{address[1].decode()}/session") as socket:
            session = Session(socket)
            await session.call("session.new", capabilities={})
            await session.call("session.subscribe", events=["log.entryAdded"])
            tab = (await session.call("browsingContext.create", type="tab"))["context"]
            faults = []
            for to, there in pages:
                # Another document first: two addresses of one page differ in the fragment only.
                await session.call("browsingContext.navigate", context=tab, url="about:blank", wait="complete")
                await session.call(
                    "browsingContext.navigate", context=tab, url=f"{site.as_uri()}/{to}", wait="complete"
                )
                for _ in range(100):
                    if await session.value(tab, there):
                        break
                    await asyncio.sleep(0.1)
                else:
                    faults.append(f"{to}: not drawn")
            return faults + [f"{e['level']}: {e['text']}" for e in session.entries if e["level"] in ("error", "warn")]
    finally:
        process.kill()
        await process.wait()


@pytest.mark.long
def test_every_kind_of_page_is_drawn_in_firefox(tmp_path):
    if FIREFOX is None:
        pytest.skip("no Firefox on this machine: `apt-get install firefox-esr`")
    path = write_atlas(tmp_path / "atlas.h5")
    (tmp_path / "families.yaml").write_text(FAMILIES)
    build(path)
    (tmp_path / "profile").mkdir()
    assert asyncio.run(visited(tmp_path / "profile", tmp_path / "site", PAGES)) == []
