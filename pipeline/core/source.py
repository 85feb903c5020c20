"""Digest of the source code of this package, by which derived files that older code made are recognized."""

import functools
import hashlib
from pathlib import Path

SUFFIXES = {".py", ".html", ".css", ".js", ".svg", ".json", ".c"}


@functools.cache
def package_digest() -> str:
    """Return the sha256 of all source files of the package `pipeline`: code, templates, styles and scripts."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in SUFFIXES and path.is_file():
            digest.update(str(path.relative_to(root)).encode() + b"\0")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
