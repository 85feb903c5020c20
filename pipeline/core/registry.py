"""Registries: find the members of a group (parameterizations, transforms, …) by name and build them from mappings.

A member is a frozen dataclass. Its fields are its parameters and its class docstring is its documentation. A plain
mapping such as `{"name": "fourier", "decay": 1.0}` is enough to build it on any machine.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from pipeline.core import plugins
from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError, nearest_names
from pipeline.core.validation import SENTENCE, keyed_schema, validated

T = TypeVar("T")


# The name under which each class is registered. Digests and seeds depend on these names, never on class names.
_REGISTERED: dict[type, str] = {}


def registered_name(member: Any) -> str:
    """Return the name under which the class of a registry's member is registered, as it is written in `conf/`."""
    return _REGISTERED.get(type(member)) or plugins.identity(type(member))["name"]


# Metadata of a field that was added after results were stored: digests contain it only where it differs from its
# default, so that results with settings that existed before keep theirs.
ADDED_LATER = {"added_later": True}


def canonical(value: Any) -> Any:
    """Return a configuration as plain data, for digests and provenance.

    A registered dataclass becomes a mapping of its registered name (`name`) and its fields, a `ConfigFile` becomes the
    digest of its content. Fields with the metadata `ADDED_LATER` are left out at their default. Stored digests depend
    on this format.
    """
    if isinstance(value, ConfigFile):
        return value.canonical()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: canonical(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not (f.metadata.get("added_later") and getattr(value, f.name) == f.default)
        }
        name = _REGISTERED.get(type(value))
        return {**plugins.identity(type(value)), **fields} if name is None else {"name": name, **fields}
    if isinstance(value, (list, tuple)):
        return [canonical(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): canonical(v) for k, v in value.items()}
    return value


class Registry:
    """Dataclasses by name, for one group of `conf/`.

    Args:
        noun: What a member is called in error messages, e.g. "transform".
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._members: dict[str, type] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._members))

    def __getitem__(self, name: str) -> type:
        if name not in self._members:
            plugins.load_entry_points()
        if name not in self._members:
            raise AtlasError(
                f"There is no {self.noun} {name!r}. {nearest_names(name, self._members)} A class of your own is named "
                "my_file.py:Class."
            )
        return self._members[name]

    def member(self, name: str) -> type:
        """Return the class called `name`, which may be a reference to the user's own code.

        Raises:
            AtlasError: If there is no such member, or the class cannot be loaded.
        """
        return plugins.load_member(name, self.noun, self._bases()) if plugins.is_reference(name) else self[name]

    def _bases(self) -> list[type]:
        """Return the classes that all members are derived from."""
        shared = set.intersection(*(set(cls.__mro__) for cls in self._members.values()))
        return [cls for cls in shared if cls is not object and cls.__module__ not in ("abc", "typing")]

    def add(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a class decorator that registers a frozen dataclass under `name`."""

        def register(cls: type[T]) -> type[T]:
            assert dataclasses.is_dataclass(cls), f"{cls} must be a dataclass"
            assert name not in self._members, f"{self.noun} {name!r} exists twice"
            self._members[name] = cls
            _REGISTERED[cls] = name
            return cls

        return register

    def build(self, mapping: Any) -> Any:
        """Build the member that `mapping["name"]` names, with the other keys as its parameters.

        Args:
            mapping: The member's name and parameters.

        Raises:
            AtlasError: If there is no such member.
            ValidationError: If there is no name, or a parameter is invalid.
        """
        if not isinstance(mapping, Mapping) or not isinstance(mapping.get("name"), str):
            raise PydanticCustomError(SENTENCE, " needs a `name`: one of {names}", {"names": ", ".join(self)})
        return validated(self.member(mapping["name"]), {k: v for k, v in mapping.items() if k != "name"})

    def name_by_key(self, mapping: Any) -> Any:
        """Return a mapping of members with their names: a member is called by its key unless it has a `name`."""
        if not isinstance(mapping or {}, Mapping):
            return mapping
        # Only an absent or empty entry stands for the defaults; anything else that is no mapping is refused below.
        return {
            key: {"name": key, **(settings or {})} if isinstance(settings or {}, Mapping) else settings
            for key, settings in (mapping or {}).items()
        }


@dataclasses.dataclass(frozen=True)
class Member:
    """Annotation of a field that holds a member of a registry, given as a mapping with its `name`."""

    registry: Registry

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        """Return the schema for pydantic."""
        return core_schema.no_info_plain_validator_function(self.registry.build)


@dataclasses.dataclass(frozen=True)
class Members:
    """Annotation of a field that holds a tuple of members of a registry, given as a mapping of their settings by key.

    The order of the mapping is kept. One member of the registry can occur several times, under different keys:
    `jitter_after: {name: jitter}`.
    """

    registry: Registry

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        """Return the schema for pydantic."""
        return keyed_schema(self.registry.build, self.registry.name_by_key)
