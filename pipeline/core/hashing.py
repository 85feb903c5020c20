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


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the digest of the names and bytes of `arrays`; shapes and dtypes are not part of it."""
    return digest_of([[name, array.tobytes().hex()] for name, array in sorted(arrays.items())])
