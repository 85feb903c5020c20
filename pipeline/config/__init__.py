"""Typed configuration from plain data."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.schema import Config as Config
    from pipeline.config.schema import from_tree as from_tree


def __getattr__(name: str) -> Any:
    # The schema contains all settings of visualizations, which need torch.
    if name not in ("Config", "from_tree"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("pipeline.config.schema"), name)
