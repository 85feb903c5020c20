"""Validation of configurations: plain data as YAML gives it becomes frozen dataclasses, or an error that names the key.

The limits of a setting stand on its field, as pydantic's `Field(ge=1)` or as a `Literal` of its choices. Input is
validated strictly, as JSON: an integer may be a float, a list a tuple and a mapping a dataclass, but no text is a
number and no boolean an integer.
"""

import dataclasses
import functools
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from pipeline.core.errors import AtlasError, nearest_names

T = TypeVar("T")

# What is needed in the place of a wrong type, by pydantic's type of error.
NEEDED = {
    "int_type": "int",
    "float_type": "float",
    "string_type": "str",
    "bool_type": "bool",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
}
# Sentences about limits, by the name of the limit in the context of pydantic's errors.
LIMITS = {"ge": "is too small: at least", "gt": "must be above", "le": "is too large: at most", "lt": "must be below"}
LIMIT_ERRORS = ("greater_than_equal", "greater_than", "less_than_equal", "less_than")
# Type of our own errors, whose message continues the key.
SENTENCE = "sentence"
# A value in pydantic's list of the choices of a `Literal`.
QUOTED = r"'([^']*)'"


@dataclasses.dataclass(frozen=True)
class Use:
    """Annotation of a field with what to use instead of an invalid value, where types and limits would not say it.

    Attributes:
        valid: The valid values in words, e.g. "auto or a number above 0".
    """

    valid: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        """Return the schema for pydantic."""
        schema = handler(source)
        return core_schema.custom_error_schema(
            schema, SENTENCE, custom_error_message=": use {valid}", custom_error_context={"valid": self.valid}
        )


@dataclasses.dataclass(frozen=True)
class NullMeans:
    """Annotation of an optional field with what null stands for; errors about its limit mention it.

    Attributes:
        meaning: What null stands for, e.g. "no limit".
    """

    meaning: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        """Return the schema for pydantic."""
        return core_schema.no_info_wrap_validator_function(self._validate, handler(source))

    def _validate(self, value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            least = error.errors(include_url=False)[0].get("ctx", {}).get("ge")
            if least is None:
                raise
            message = " is too small: at least {least}, or null for {meaning}"
            raise PydanticCustomError(SENTENCE, message, {"least": least, "meaning": self.meaning}) from None


class Keyed:
    """Annotation of a field that holds a tuple of dataclasses, given as a mapping of their settings by key.

    The keys are for people and for overrides; the order of the mapping is kept.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> CoreSchema:
        """Return the schema for pydantic."""
        return keyed_schema(functools.partial(validated, typing.get_args(source)[0]), lambda mapping: mapping or {})


def keyed_schema(build_one: Callable[[Any], Any], prepare: Callable[[Any], Any]) -> CoreSchema:
    """Return the schema of a tuple that is given as a mapping.

    Args:
        build_one: Builds a member from a value of the mapping.
        prepare: Function that is called with the mapping before it is checked, and may complete it.
    """
    one = core_schema.no_info_plain_validator_function(build_one)
    mapping = core_schema.dict_schema(core_schema.str_schema(), one)
    prepared = core_schema.no_info_before_validator_function(prepare, mapping)
    return core_schema.no_info_after_validator_function(lambda members: tuple(members.values()), prepared)


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def validated(kind: type[T], plain: Any) -> T:
    """Return a dataclass from plain data.

    Raises:
        ValidationError: If a key is unknown or missing, or a value invalid.
    """
    try:
        return _adapter(kind).validate_json(json.dumps(plain, default=str), strict=True, extra="forbid")
    except ValidationError as error:
        unknown = [d for d in error.errors(include_url=False) if d["type"] == "unexpected_keyword_argument"]
        if not unknown:
            raise
        # A misspelled key is the likely reason for a missing one: report it alone.
        loc = unknown[0]["loc"]
        nearest = nearest_names(str(loc[-1]), (field.name for field in dataclasses.fields(_kind_at(kind, loc[:-1]))))
        sentence = PydanticCustomError(SENTENCE, " is not a setting. {nearest}", {"nearest": nearest.rstrip(".")})
        details = InitErrorDetails(type=sentence, loc=loc, input=unknown[0]["input"])
        raise ValidationError.from_exception_data(error.title, [details]) from None


def _kind_at(kind: Any, loc: Sequence[int | str]) -> Any:
    """Return the dataclass at a location within a dataclass of dataclasses."""
    for part in loc:
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind)[str(part)]
        else:  # an item of a tuple or mapping
            kind = next(argument for argument in typing.get_args(kind) if dataclasses.is_dataclass(argument))
    return kind


def build(kind: type[T], plain: Mapping[str, Any]) -> T:
    """Return a frozen dataclass from plain data.

    Args:
        kind: The dataclass.
        plain: Values of its fields by name; fields with a default may be absent.

    Raises:
        AtlasError: If a key is unknown or missing, or a value invalid; the message begins with the key.
    """
    try:
        return validated(kind, plain)
    except ValidationError as error:
        raise AtlasError(explain(error, plain)) from None


def explain(error: ValidationError, plain: Mapping[str, Any]) -> str:
    """Return the first problem of a validation as a sentence that begins with the dotted key.

    Args:
        error: The error.
        plain: The data that were validated.
    """
    errors = error.errors(include_url=False)
    kind, context = errors[0]["type"], errors[0].get("ctx", {})
    loc, value = _place(errors[0]["loc"], plain)
    key = re.sub(r"\.\[", "[", ".".join(f"[{part}]" if isinstance(part, int) else part for part in loc))
    if kind == "missing" and loc == errors[0]["loc"][:-1] and not isinstance(errors[0]["loc"][-1], int):
        return f"{'.'.join(filter(None, (key, str(errors[0]['loc'][-1]))))} is missing."
    if kind == SENTENCE:
        shown = f"={value!r}" if errors[0]["msg"].startswith((": use", " is too")) else ""
        return f"{key}{shown}{errors[0]['msg']}."
    for limit, words in LIMITS.items():
        if limit in context and kind in LIMIT_ERRORS:
            return f"{key}={value} {words} {context[limit]:,}.".replace(".0.", ".")
    if kind == "finite_number":
        return f"{key}={value} must be a finite number."
    if kind == "literal_error" and len(errors) == 1:
        return f"{key}={value!r} is not one of {', '.join(re.findall(QUOTED, context['expected']))}."
    needed = dict.fromkeys(_needed(details, loc) for details in errors if details["loc"][: len(loc)] == loc)
    return f"{key}={value!r} has the wrong type: {' or '.join(needed)} is needed."


def _place(loc: Sequence[int | str], plain: Any) -> tuple[tuple[int | str, ...], Any]:
    """Return the part of a location that exists in the data, and the value there; the rest are parts of a union."""
    place: list[int | str] = []
    for part in loc:
        if isinstance(plain, Mapping) and part in plain:
            plain = plain[str(part)]
        elif isinstance(plain, (list, tuple)) and isinstance(part, int) and part < len(plain):
            plain = plain[part]
        else:
            break
        place.append(part)
    return tuple(place), plain


def _needed(details: Any, loc: Sequence[int | str]) -> str:
    """Return in words what an error says is needed at a location."""
    rest = details["loc"][len(loc) :]
    if details["type"] == "literal_error":
        return details["ctx"]["expected"]
    if details["type"] in ("missing", "too_long"):
        return "a list of another length"
    lists = "a list of " * sum(isinstance(part, int) for part in rest)
    return f"{lists}{NEEDED.get(details['type'], details['msg'])}"
