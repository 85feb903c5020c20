"""Firefox without a window, driven by its own WebDriver BiDi, so that no driver is needed.

https://w3c.github.io/webdriver-bidi/
"""

import asyncio
import base64
import concurrent.futures
import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)
SECONDS = 60
# What BiDi of Firefox cannot set for a page are preferences of the whole browser.
LIGHT: dict[str, Any] = {"layout.css.prefers-color-scheme.content-override": 1}
DARK: dict[str, Any] = {"layout.css.prefers-color-scheme.content-override": 0}
FORCED_COLORS: dict[str, Any] = {"browser.display.document_color_use": 2}
NO_SCRIPT: dict[str, Any] = {"javascript.enabled": False}
TAB_KEY = "\ue004"


class Firefox:
    """A browser with one tab.

    Attributes:
        messages: Errors and warnings of the pages so far.
    """

    def __init__(self, profile: Path, preferences: dict[str, Any]) -> None:
        profile.mkdir()
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in preferences.items()]
        (profile / "user.js").write_text("".join(lines))
        self.messages: list[str] = []
        self._profile = profile
        self._has_script = bool(preferences.get("javascript.enabled", True))
        self._numbers = itertools.count(1)
        # In a thread of its own: Playwright's event loop runs in that of the tests.
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._runner = asyncio.Runner()
        self._stack = contextlib.AsyncExitStack()

    def __enter__(self) -> "Firefox":
        self._run(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._stack.aclose())
        self._thread.submit(self._runner.close).result()
        self._thread.shutdown()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Return the result of a coroutine."""
        return self._thread.submit(self._runner.run, work).result()

    async def _start(self) -> None:
        import aiohttp

        assert FIREFOX is not None
        arguments = ["--headless", "--no-remote", "--profile", str(self._profile), "--remote-debugging-port", "0"]
        process = await asyncio.create_subprocess_exec(
            FIREFOX, *arguments, "about:blank", stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
        )
        self._stack.push_async_callback(process.wait)
        self._stack.callback(process.kill)
        assert process.stderr is not None
        address = None
        while address is None:
            line = await asyncio.wait_for(process.stderr.readline(), SECONDS)
            assert line, "Firefox ended"
            address = re.search(rb"WebDriver BiDi listening on (ws://\S+)", line)
        client = await self._stack.enter_async_context(aiohttp.ClientSession())
        connection = client.ws_connect(f"{address[1].decode()}/session", max_msg_size=0)
        self._socket = await self._stack.enter_async_context(connection)
        await self._call("session.new", capabilities={})
        await self._call("session.subscribe", events=["log.entryAdded"])
        self._tab = (await self._call("browsingContext.create", type="tab"))["context"]

    async def _call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the result of a command; log entries that come before it are kept."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await asyncio.wait_for(self._socket.receive_json(), SECONDS)
            if message.get("method") == "log.entryAdded":
                entry = message["params"]
                if entry["level"] in ("error", "warn"):
                    self.messages.append(f"{entry['level']}: {entry['text']}")
            elif message.get("id") == number:
                assert message["type"] == "success", message
                return message["result"]

    def goto(self, url: str) -> None:
        """Open an address, as another document than the present one."""
        for to in ("about:blank", url):
            self._run(self._call("browsingContext.navigate", context=self._tab, url=to, wait="complete"))

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression, or of its promise if pages have scripts, through JSON."""
        wrapped = f"JSON.stringify({expression} ?? null)"
        if self._has_script:  # else no promise is ever fulfilled
            wrapped = f"Promise.resolve({expression}).then((value) => JSON.stringify(value ?? null))"
        target = {"context": self._tab, "sandbox": "tests"}
        answer = self._run(self._call("script.evaluate", expression=wrapped, target=target, awaitPromise=True))
        assert answer["type"] == "success", answer["exceptionDetails"]["text"]
        return json.loads(answer["result"]["value"])

    def resize(self, width: int, height: int = 800) -> None:
        """Give the page another size, in CSS pixels."""
        viewport = {"width": width, "height": height}
        self._run(self._call("browsingContext.setViewport", context=self._tab, viewport=viewport))

    def set_file(self, selector: str, path: Path) -> None:
        """Choose a file in a file input."""
        found = f"document.querySelector({json.dumps(selector)})"
        target = {"context": self._tab, "sandbox": "tests"}
        node = self._run(self._call("script.evaluate", expression=found, target=target, awaitPromise=False))["result"]
        element = {"sharedId": node["sharedId"]}
        self._run(self._call("input.setFiles", context=self._tab, element=element, files=[str(path)]))

    def tab(self) -> None:
        """Press the tabulator key."""
        keys = [{"type": kind, "value": TAB_KEY} for kind in ("keyDown", "keyUp")]
        actions = [{"type": "key", "id": "keyboard", "actions": keys}]
        self._run(self._call("input.performActions", context=self._tab, actions=actions))

    def pdf(self) -> bytes:
        """Return the page as it is printed."""
        return base64.b64decode(self._run(self._call("browsingContext.print", context=self._tab))["data"])
