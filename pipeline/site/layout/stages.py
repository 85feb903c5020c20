"""Stages of a network: consecutive layers whose activation maps have the same size."""

import dataclasses
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

# Above this number of layers, pages fold the stages.
FOLD_ABOVE = 20

Size = tuple[int, int]


class Sized(Protocol):
    """Anything with the size of an activation map."""

    @property
    def map_size(self) -> Size:
        """(height, width)."""
        ...


T = TypeVar("T", bound=Sized)


@dataclasses.dataclass(frozen=True)
class Stage(Generic[T]):
    """Consecutive layers.

    Attributes:
        size: (height, width) of their activation maps.
        layers: The layers, in order.
    """

    size: Size
    layers: tuple[T, ...]

    @property
    def caption(self) -> str:
        """The size of the maps, in words."""
        return f"{self.size[0]} × {self.size[1]}"


def stages_of(layers: Sequence[T]) -> list[Stage[T]]:
    """Divide layers into stages.

    A layer with a map of 1 × 1 in the middle of a stage, such as that of a squeeze-and-excitation block, belongs to it.
    """
    found: list[tuple[Size, list[T]]] = []
    for i, layer in enumerate(layers):
        size = layer.map_size
        if found and (size == found[-1][0] or (size == (1, 1) and _continues(found[-1][0], layers[i + 1 :]))):
            found[-1][1].append(layer)
        else:
            found.append((size, [layer]))
    return [Stage(size, tuple(members)) for size, members in found]


def _continues(size: Size, following: Sequence[Sized]) -> bool:
    """Return whether the next layer with a map larger than 1 × 1 has maps of `size`."""
    return next((layer.map_size == size for layer in following if layer.map_size != (1, 1)), False)
