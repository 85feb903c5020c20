"""Registries: find the members of a group (parameterizations, transforms, …) by name and build them from mappings.

A member is a frozen dataclass. Its fields are its parameters and its class docstring is its documentation. A plain
mapping such as `{"name": "fourier", "decay": 1.0}` is enough to build it on any machine.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError, nearest_names

T = TypeVar("T")


def coerce(value: Any, kind: Any, where: str) -> Any:
    """Convert a value of a configuration to an annotated type.

    Only lossless conversions are made: int to float, list to tuple, str to `ConfigFile`, mapping to dataclass.

    Args:
        value: A plain value.
        kind: The type annotation.
        where: Dotted key of the setting, for the error message.

    Raises:
        AtlasError: If the value has another type.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        # Try the exact type first, so that 3 stays an int for `int | float`.
        options = sorted(
            (a for a in args if a is not type(None)), key=lambda a: not (isinstance(a, type) and type(value) is a)
        )
        for option in options:
            try:
                return coerce(value, option, where)
            except AtlasError:
                continue
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            if len(args) == 2 and args[1] is Ellipsis:
                return tuple(coerce(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
            if len(value) == len(args):
                return tuple(coerce(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, args, strict=True)))
    elif origin is Mapping:
        if isinstance(value, Mapping):
            return {str(k): coerce(v, args[1], f"{where}.{k}") for k, v in value.items()}
    elif kind is ConfigFile and isinstance(value, str):
        return ConfigFile(value)
    elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return build(kind, value, where)
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise AtlasError(f"{where}={value!r} has the wrong type: {describe(kind)} is needed.")


def describe(kind: Any) -> str:
    """Return a type annotation in words, for error messages."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if kind is type(None):
        return "null"
    if typing.get_origin(kind) is Mapping:
        return f"a mapping to {describe(args[1])}"
    if typing.get_origin(kind) is tuple:
        return f"a list of {describe(args[0])}"
    return "a file's path" if kind is ConfigFile else getattr(kind, "__name__", str(kind))


def build(kind: type[T], mapping: Mapping[str, Any], where: str = "") -> T:
    """Build a frozen dataclass from a plain mapping.

    Args:
        kind: The dataclass.
        mapping: Values of its fields by name; fields with a default may be absent.
        where: Dotted key of the mapping, for error messages.

    Raises:
        AtlasError: If a key is unknown, a required one is missing, or a value has the wrong type.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    dot = f"{where}." if where else ""
    for key in mapping:
        if key not in fields:
            raise AtlasError(f"{dot}{key} is not a setting. {nearest_names(str(key), fields)}")
    values = {k: coerce(v, hints[k], f"{dot}{k}") for k, v in mapping.items()}
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise AtlasError(f"{dot}{name} is missing: {describe(hints[name])} is needed.")
    return kind(**values)


# The name under which each class is registered. Digests and seeds depend on these names, never on class names.
_REGISTERED: dict[type, str] = {}


def registered_name(member: Any) -> str:
    """Return the name under which the class of a registry's member is registered, as it is written in `conf/`."""
    return _REGISTERED[type(member)]


def canonical(value: Any) -> Any:
    """Return a configuration as plain data, for digests and provenance.

    A registered dataclass becomes a mapping of its registered name (`name`) and its fields, a `ConfigFile` becomes the
    digest of its content. Stored digests depend on this format.
    """
    if isinstance(value, ConfigFile):
        return value.canonical()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: canonical(getattr(value, f.name)) for f in dataclasses.fields(value)}
        name = _REGISTERED.get(type(value))
        return fields if name is None else {"name": name, **fields}
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
            raise AtlasError(f"There is no {self.noun} {name!r}. {nearest_names(name, self._members)}")
        return self._members[name]

    def add(self, name: str) -> Callable[[type[T]], type[T]]:
        """Return a class decorator that registers a frozen dataclass under `name`."""

        def register(cls: type[T]) -> type[T]:
            assert dataclasses.is_dataclass(cls), f"{cls} must be a dataclass"
            assert name not in self._members, f"{self.noun} {name!r} exists twice"
            self._members[name] = cls
            _REGISTERED[cls] = name
            return cls

        return register

    def build(self, mapping: Mapping[str, Any], where: str) -> Any:
        """Build the member that `mapping["name"]` names, with the other keys as its parameters.

        Args:
            mapping: The member's name and parameters.
            where: Dotted key of the mapping, for error messages.

        Raises:
            AtlasError: If there is no such member, or a parameter is invalid.
        """
        if not isinstance(mapping, Mapping) or not isinstance(mapping.get("name"), str):
            raise AtlasError(f"{where} needs a `name`: one of {', '.join(self)}.")
        parameters = {k: v for k, v in mapping.items() if k != "name"}
        return build(self[mapping["name"]], parameters, where)
