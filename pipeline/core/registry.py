"""Members of a group (canvases, transforms, objectives, …) found by name and built from plain mappings.

A member is a frozen dataclass. Its fields are its parameters, its class docstring is its documentation,
and a mapping `{"name": "fourier", "decay": 1.0}` is all that is needed to build it, on any machine.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError, nearest

T = TypeVar("T")


def coerce(value: Any, kind: Any, where: str) -> Any:
    """`value` as the annotated type `kind`, or an `AtlasError` that names the key `where`.

    Only harmless changes of type are made: int to float, list to tuple, mapping to dataclass.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        # The exact type first, so that `int | float` keeps 3 an int.
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
    """A type annotation in the words of an error message."""
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
    """A frozen dataclass `kind` from a plain mapping; unknown keys and wrong types are errors."""
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    dot = f"{where}." if where else ""
    for key in mapping:
        if key not in fields:
            raise AtlasError(f"{dot}{key} is not a setting. {nearest(str(key), fields)}")
    values = {k: coerce(v, hints[k], f"{dot}{k}") for k, v in mapping.items()}
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise AtlasError(f"{dot}{name} is missing: {describe(hints[name])} is needed.")
    return kind(**values)


# The name under which each class was registered. Digests and seeds depend on these, never on the names of classes.
_REGISTERED: dict[type, str] = {}


def registered_name(member: Any) -> str:
    """Return the name under which the class of a registry's member was registered, as it is written in `conf/`."""
    return _REGISTERED[type(member)]


def canonical(value: Any) -> Any:
    """Return a configuration as plain data for digests and provenance: members as {"name": registered name, fields}."""
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
    """Name → dataclass, for one group of `conf/`."""

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._members: dict[str, type] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._members))

    def __getitem__(self, name: str) -> type:
        if name not in self._members:
            raise AtlasError(f"There is no {self.noun} {name!r}. {nearest(name, self._members)}")
        return self._members[name]

    def add(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: make a frozen dataclass a member under `name`."""

        def register(cls: type[T]) -> type[T]:
            assert dataclasses.is_dataclass(cls), f"{cls} must be a dataclass"
            assert name not in self._members, f"{self.noun} {name!r} exists twice"
            self._members[name] = cls
            _REGISTERED[cls] = name
            return cls

        return register

    def build(self, mapping: Mapping[str, Any], where: str) -> Any:
        """The member that `mapping["name"]` names, with the other keys as its parameters."""
        if not isinstance(mapping, Mapping) or not isinstance(mapping.get("name"), str):
            raise AtlasError(f"{where} needs a `name`: one of {', '.join(self)}.")
        rest = {k: v for k, v in mapping.items() if k != "name"}
        return build(self[mapping["name"]], rest, where)
