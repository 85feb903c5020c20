"""Families: named groups of units with comments, written by people in YAML, as in the circuits papers.

families:
  - name: Curves
    comment: Arcs of about 60 pixels, each in its own orientation.
    source: https://distill.pub/2020/circuits/curve-detectors
    units:
      - blocks.2.0:17
      - {unit: "blocks.2.0:31", comment: fires for circles, too}
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.config_files import decoded
from pipeline.core.errors import AtlasError, first_line
from pipeline.store.shards import safe

BESIDE = "families.yaml"


@dataclasses.dataclass(frozen=True)
class Member:
    """A unit of a family; `there` says whether this atlas has it."""

    layer: str
    channel: int
    comment: str
    there: bool

    @property
    def name(self) -> str:
        """`layer:channel`."""
        return f"{self.layer}:{self.channel}"


@dataclasses.dataclass(frozen=True)
class Family:
    """A named group. `source` is a link, or nothing."""

    name: str
    slug: str
    comment: str
    source: str
    members: tuple[Member, ...]

    @property
    def href(self) -> str:
        """Page of the family, from the site's root."""
        return f"families/{self.slug}.html"

    @property
    def present(self) -> tuple[Member, ...]:
        """Members that this atlas has."""
        return tuple(member for member in self.members if member.there)


def read(path: Path | None, units: Mapping[str, frozenset[int]]) -> tuple[Family, ...]:
    """Families of the file at `path`, none without one; `units` are the channels of each layer of the atlas.

    A unit that the atlas does not have stays, marked as absent. Raises `AtlasError` for a file of another shape.
    """
    if path is None:
        return ()
    try:
        tree = yaml.safe_load(decoded(path.read_bytes(), f"site.families={str(path)!r}"))
    except OSError as error:
        raise AtlasError(f"site.families={str(path)!r} can't be read: {error.strerror or error}.") from None
    except yaml.YAMLError as error:
        raise AtlasError(f"{path} is no YAML: {first_line(error)}") from None
    entries = tree.get("families") if isinstance(tree, Mapping) else None
    if not isinstance(entries, list):
        raise AtlasError(f"{path} must hold `families:` and below it a list of groups; docs/site.md shows one.")
    found: list[Family] = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}, family {number}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"].strip():
            raise AtlasError(f"{where} needs a `name`.")
        unknown = sorted(set(entry) - {"name", "comment", "source", "units"}, key=str)
        if unknown:
            raise AtlasError(f"{where} has {unknown[0]!r}; it may have name, comment, source and units.")
        listed = entry.get("units", [])
        if not isinstance(listed, list):
            raise AtlasError(f"{where}: `units` must be a list of layer:channel.")
        source = str(entry.get("source") or "")
        if source and not re.match(r"https?://", source):
            raise AtlasError(f"{where}: source={source!r} must begin with https:// or http://.")
        slug = safe(str(entry["name"]).strip().lower().replace(" ", "-"))
        if any(family.slug == slug for family in found):
            raise AtlasError(f"{where}: there are two families called {entry['name']!r}.")
        members = tuple(_member(unit, where, units) for unit in listed)
        found.append(Family(entry["name"].strip(), slug, str(entry.get("comment") or ""), source, members))
    return tuple(found)


def _member(entry: Any, where: str, units: Mapping[str, frozenset[int]]) -> Member:
    comment = ""
    if isinstance(entry, Mapping):
        unknown = sorted(set(entry) - {"unit", "comment"}, key=str)
        if unknown:
            raise AtlasError(f"{where}: a unit has {unknown[0]!r}; it may have unit and comment.")
        entry, comment = entry.get("unit"), str(entry.get("comment") or "")
    layer, colon, channel = str(entry).rpartition(":")
    if not colon or not layer or not re.fullmatch(r"[0-9]+", channel):
        raise AtlasError(f"{where}: {entry!r} is no unit; write layer:channel, in quotes.")
    return Member(layer, int(channel), comment, int(channel) in units.get(layer, frozenset()))
