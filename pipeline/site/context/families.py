"""Families: named and commented groups of units in a YAML file that the user writes, as in the circuits papers.

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

from pipeline.core.config_files import decode_text, load_yaml
from pipeline.core.errors import AtlasError
from pipeline.core.units import Unit
from pipeline.store.shards import safe_name

DEFAULT_FILE = "families.yaml"


@dataclasses.dataclass(frozen=True)
class Member:
    """A unit of a family; `in_atlas` is False if the atlas does not contain it."""

    layer: str
    channel: int
    comment: str
    in_atlas: bool

    @property
    def name(self) -> str:
        """`layer:channel`."""
        return str(Unit(self.layer, self.channel))


@dataclasses.dataclass(frozen=True)
class Family:
    """A named group of units.

    Attributes:
        name: Name of the family.
        slug: Its name in file names.
        comment: Comment on the family; may be empty.
        source: Link to a source, or "".
        members: Units, also those that are not in the atlas.
    """

    name: str
    slug: str
    comment: str
    source: str
    members: tuple[Member, ...]

    @property
    def href(self) -> str:
        """Path of the family's page, relative to the root of the site."""
        return f"families/{self.slug}.html"

    @property
    def present(self) -> tuple[Member, ...]:
        """Members that are in the atlas."""
        return tuple(member for member in self.members if member.in_atlas)


def find_families(configured: str | None, folder: Path) -> Path | None:
    """Return the file of `site.families`, or else the families file in the folder of the atlas, if there is one."""
    if configured is not None:
        return Path(configured).expanduser()
    beside = folder / DEFAULT_FILE
    return beside if beside.is_file() else None


def read_families(path: Path | None, units: Mapping[str, frozenset[int]]) -> tuple[Family, ...]:
    """Read the families of a YAML file.

    Args:
        path: The file; None gives no families.
        units: Channels of the atlas by layer. Other units of a family are kept, marked as not in the atlas.

    Raises:
        AtlasError: If the file cannot be read, or does not have the documented form.
    """
    if path is None:
        return ()
    try:
        text = decode_text(path.read_bytes(), f"site.families={str(path)!r}")
    except OSError as error:
        raise AtlasError(f"site.families={str(path)!r} can't be read: {error.strerror or error}.") from None
    tree = load_yaml(text, str(path))
    entries = tree.get("families") if isinstance(tree, Mapping) else None
    if not isinstance(entries, list):
        raise AtlasError(f"{path} must contain `families:` followed by a list of groups; see docs/site.md.")
    families: list[Family] = []
    for number, entry in enumerate(entries, 1):
        where = f"{path}, family {number}"
        family = _family(entry, where, units)
        if any(other.slug == family.slug for other in families):
            raise AtlasError(f"{where}: there are two families called {entry['name']!r}.")
        families.append(family)
    return tuple(families)


def _family(entry: Any, where: str, units: Mapping[str, frozenset[int]]) -> Family:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"].strip():
        raise AtlasError(f"{where} needs a `name`.")
    _refuse_unknown_keys(entry, ("name", "comment", "source", "units"), where)
    members = entry.get("units", [])
    if not isinstance(members, list):
        raise AtlasError(f"{where}: `units` must be a list of layer:channel.")
    source = str(entry.get("source") or "")
    if source and not re.match(r"https?://", source):
        raise AtlasError(f"{where}: source={source!r} must begin with https:// or http://.")
    name = entry["name"].strip()
    return Family(
        name=name,
        slug=safe_name(name.lower().replace(" ", "-")),
        comment=str(entry.get("comment") or ""),
        source=source,
        members=tuple(_member(unit, where, units) for unit in members),
    )


def _member(entry: Any, where: str, units: Mapping[str, frozenset[int]]) -> Member:
    comment = ""
    if isinstance(entry, Mapping):
        _refuse_unknown_keys(entry, ("unit", "comment"), f"{where}: a unit")
        entry, comment = entry.get("unit"), str(entry.get("comment") or "")
    try:
        unit = Unit.parse(str(entry))
    except AtlasError:
        # YAML reads some unquoted units as numbers: 1:30 is 90.
        raise AtlasError(f"{where}: {entry!r} is not a unit; write layer:channel, in quotes.") from None
    return Member(*unit, comment, unit.channel in units.get(unit.layer, frozenset()))


def _refuse_unknown_keys(entry: Mapping[Any, Any], allowed: tuple[str, ...], where: str) -> None:
    unknown = sorted(set(entry) - set(allowed), key=str)
    if unknown:
        raise AtlasError(f"{where} has {unknown[0]!r}; it may have {', '.join(allowed[:-1])} and {allowed[-1]}.")
