"""Digests of plain data and of arrays, for identities of shards, atlases and sites."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def digest_of(value: Any) -> str:
    """Return the sha256 of plain data as canonical JSON.

    Equal content gives equal digests, whatever the order of the keys of its mappings.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def hash64(name: str, purpose: str) -> int:
    """Return a pseudo-random integer below 2⁶⁴ that depends only on the name and the purpose."""
    text = f"{purpose}\0{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the digest of the names and bytes of `arrays`; shapes and dtypes are not part of it."""
    return digest_of([[name, array.tobytes().hex()] for name, array in sorted(arrays.items())])
