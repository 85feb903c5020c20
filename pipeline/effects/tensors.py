"""Tensors inside the nested inputs and outputs of modules."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return nested tuples, lists, mappings and dataclasses with `function` applied to all tensors, in their order.

    The order is that of `tracing.tensors_in`.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(part, function) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(part, function) for part in value)
    if isinstance(value, Mapping):
        changed = {key: map_tensors(part, function) for key, part in value.items()}
        try:
            return type(value)(changed)  # type: ignore[call-arg]
        except TypeError:
            return changed
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: map_tensors(getattr(value, field.name), function) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def with_first_tensor(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a nested value with `function` applied to its first tensor, the main one (`tracing.tensor_of`)."""
    seen = False

    def first_only(tensor: Tensor) -> Tensor:
        nonlocal seen
        if seen:
            return tensor
        seen = True
        return function(tensor)

    return map_tensors(value, first_only)
