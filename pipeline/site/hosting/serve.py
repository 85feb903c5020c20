"""Local web server for a site, on the loopback address only."""

import functools
import http.server
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtlasError
from pipeline.site.output import ours

HOST = "127.0.0.1"


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Handler that disables caching, so that a rebuilt page is shown at once."""

    def end_headers(self) -> None:
        """Add the header that disables caching."""
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send the site's own 404 page, which searches for the new address of a unit."""
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
        """Log nothing: every image would be a line."""


def server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """Return a server of `folder` on the loopback address; port 0 selects a free port.

    Raises:
        AtlasError: If the folder is not a site or the port cannot be used.
    """
    if not ours(folder):
        raise AtlasError(f"{folder} contains no site. Build it with `atlas site`.")
    try:
        return http.server.ThreadingHTTPServer((HOST, port), functools.partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise AtlasError(f"Port {port} cannot be used: {error}. Choose another one, for example port=8001.") from None
