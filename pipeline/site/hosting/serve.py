"""Local web server for a site, on the loopback address only.

It serves the files of the site and nothing else. Pages of other sites in the same browser cannot read it: they reach
it only under names of their own (DNS rebinding), which are refused.
"""

import functools
import http.server
import io
import os
import re
import socket
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from pipeline.core.errors import AtlasError
from pipeline.site.hosting.hosts import POLICY
from pipeline.site.output import ours

HOST = "127.0.0.1"

# Names under which the server is asked for its files.
NAMES = ("127.0.0.1", "localhost", "[::1]")

# Most requests at a time, and seconds without a sign of life after which one ends.
MAX_REQUESTS, TIMEOUT = 64, 30.0


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Handler of one connection. Caching is disabled, so that a rebuilt page is shown at once."""

    timeout = TIMEOUT
    _left: int | None = None  # bytes of the requested part that are still to be sent

    def end_headers(self) -> None:
        """Add the headers of a published site."""
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Content-Security-Policy", f"{POLICY}; frame-ancestors 'self'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        super().end_headers()

    def send_head(self) -> io.BytesIO | BinaryIO | None:
        """Send the header of a file of the site, or an error; return what remains to be sent."""
        self._left = None
        name, _, port = self.headers.get("Host", "").rpartition(":")
        if name not in NAMES or port != str(self._port):
            self.send_error(421, "Misdirected Request")
            return None
        path = self._file()
        if path is None:
            self.send_error(404, "File not found")
            return None
        part = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        return self._send_part(path, part[1], part[2]) if part and any(part.groups()) else super().send_head()

    @property
    def _port(self) -> int:
        assert isinstance(self.server, http.server.HTTPServer)
        return self.server.server_port

    def _file(self) -> Path | None:
        """Return the requested file, or folder with an index; None if the site has none.

        Links that lead out of the site, and files whose name begins with a dot, are not served.
        """
        root = Path(self.directory).resolve()
        parts = unquote(urlsplit(self.path).path, errors="surrogatepass").split("/")
        if any(part.startswith(".") for part in parts) or "\0" in self.path:
            return None
        try:
            path = Path(self.translate_path(self.path)).resolve()
            inside = path.is_relative_to(root)
            return path if inside and (path.is_file() or (path / "index.html").is_file()) else None
        except (OSError, ValueError):
            return None

    def _send_part(self, path: Path, first: str, last: str) -> BinaryIO | None:
        """Send the header of the bytes `first` to `last` of a file; without `first`, of its last bytes."""
        if not path.is_file():
            return super().send_head()  # type: ignore[return-value]
        size = path.stat().st_size
        start = int(first) if first else max(0, size - int(last))
        end = min(int(last), size - 1) if first and last else size - 1
        if start > end:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        self.send_response(206)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.send_header("Content-Length", str(end - start + 1))
        self.end_headers()
        self._left = end - start + 1
        handle = path.open("rb")
        handle.seek(start)
        return handle

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Send a file, or the requested part of it."""
        if self._left is None:
            super().copyfile(source, outputfile)
            return
        while self._left and (block := source.read(min(self._left, 1 << 16))):
            outputfile.write(block)
            self._left -= len(block)

    def list_directory(self, path: str | os.PathLike[str]) -> None:
        """Send no list of files."""
        self.send_error(404, "File not found")

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


class _Server(http.server.ThreadingHTTPServer):
    """Server with a limited number of threads, and without tracebacks of connections that browsers close."""

    request_queue_size = MAX_REQUESTS
    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        self._slots = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Handle a connection in a thread; one that finds no slot in time is closed."""
        if not self._slots.acquire(timeout=1.0):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._slots.release()
            raise

    def process_request_thread(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        """Handle a connection, then free its slot."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error, unless the browser has gone away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def server(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """Return a server of `folder` on the loopback address; port 0 selects a free port.

    Raises:
        AtlasError: If the folder is not a site or the port cannot be used.
    """
    if not ours(folder):
        raise AtlasError(f"{folder} contains no site. Build it with `atlas site`.")
    try:
        return _Server((HOST, port), functools.partial(_Handler, directory=str(folder)))
    except (OSError, OverflowError) as error:
        raise AtlasError(f"Port {port} cannot be used: {error}. Choose another one, for example port=8001.") from None
