"""What the configuration of a run folder would load and execute: shown before anybody agrees to it.

A run folder may come from anyone. Its config.yaml names code, checkpoints and exported programs, and no command loads
them unless `run.trust=true` is typed.
"""

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.core import plugins

# Settings of `model` that name code or files.
NAMED = ("source", "name", "target", "arguments", "checkpoint", "weights", "labels", "trust_checkpoint")


def what_would_load(tree: Mapping[str, Any]) -> list[str]:
    """Return a line for each network, file and class that building the network of a configuration would load."""
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 200
    shown.maxdict = shown.maxlist = 20
    settings = tree.get("model")
    model: Mapping[str, Any] = settings if isinstance(settings, Mapping) else {}
    lines = []
    for key in NAMED:
        if model.get(key) not in (None, False, {}):
            lines.append(f"model.{key}={shown.repr(model[key])}")
    for section in ("render", "also", "data"):
        lines += [f"{section}: {shown.repr(name)}" for name in dict.fromkeys(_references(tree.get(section)))]
    return lines


def untrusted_note(tree: Mapping[str, Any]) -> str:
    """Return what `verify` says where it does not build the network of a run folder."""
    loaded = "\n  ".join(what_would_load(tree)) or "nothing that can be told: the configuration names no network"
    return (
        "No visualization was rendered again, and the network was not compared: that loads what config.yaml names, and "
        f"executes code if it is the code of a user:\n  {loaded}\n"
        "If you trust this run folder, add run.trust=true; run.check=0 leaves it out."
    )


def _references(settings: Any) -> Iterator[str]:
    """Yield the members of a section that are classes or functions of a user."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            if key in ("name", "source") and isinstance(value, str) and plugins.is_reference(value):
                yield value
            yield from _references(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _references(value)
