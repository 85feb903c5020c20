"""Defaults of the members of `conf/render/GROUP/`, which their classes state.

A YAML file states only what differs from its class. In a completed tree every setting is present: overrides find it,
and the configuration that a run stores says what it was made with.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError
from pipeline.core.registry import Registry
from pipeline.visualization.preset import KEYED_GROUPS, SINGLE_GROUPS


def defaults(kind: type) -> dict[str, Any]:
    """Return the defaults of a dataclass as plain data; fields without a default are absent."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            plain[field.name] = _plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            plain[field.name] = _plain(field.default_factory())
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigFile):
        return value.path
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def complete_group(group: str, settings: Any) -> Any:
    """Return the settings of a group with the defaults of its members; what is invalid stays as it is.

    Args:
        group: Name of the group, e.g. "canvas".
        settings: Its settings as plain data.
    """
    if not isinstance(settings, Mapping):
        return settings
    if group in SINGLE_GROUPS:
        return _complete(SINGLE_GROUPS[group], settings.get("name"), settings)
    if group in KEYED_GROUPS:
        return {key: _complete(KEYED_GROUPS[group], key, member) for key, member in settings.items()}
    return settings


def _complete(registry: Registry, name: Any, settings: Any) -> Any:
    if not isinstance(settings or {}, Mapping):
        return settings
    settings = dict(settings or {})
    try:
        kind = registry[settings.get("name", name)]
    except (AtlasError, TypeError):  # validation reports it
        return settings
    named = {"name": settings["name"]} if "name" in settings else {}
    return named | defaults(kind) | settings


def complete_preset(preset: Any) -> Any:
    """Return the settings of a preset with the defaults of all members."""
    if not isinstance(preset, Mapping):
        return preset
    return {key: complete_group(key, settings) for key, settings in preset.items()}
