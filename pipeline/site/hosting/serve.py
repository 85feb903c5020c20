"""Show a site on this machine: a small server on the loopback address, for nobody else."""

import functools
import http.server
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtlasError
from pipeline.site.output import ours

HERE = "127.0.0.1"


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files as they are now: a page that is being worked on must not come from a cache."""

    def end_headers(self) -> None:
        """Add that nothing is to be kept."""
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """For a page that is not there, the site's own that looks for where it went."""
        page = Path(self.directory) / "404.html"
        if code != 404 or not page.is_file():
            super().send_error(code, message, explain)
            return
        body = page.read_bytes()
        self.send_response(404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: every picture would be a line."""


def server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of `folder` on the loopback address; port 0 takes any that is free.

    Raises `AtlasError` for a folder without a site and for a port that is taken.
    """
    if not ours(folder):
        raise AtlasError(f"{folder} holds no site: `atlas site` writes one.")
    try:
        return http.server.ThreadingHTTPServer((HERE, port), functools.partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise AtlasError(f"Port {port} can't be used: {error}. Choose another one: port=8001.") from None
