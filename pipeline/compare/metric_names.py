"""What is known of the measures that pictures are compared by: a name for people, and which way is better."""

import dataclasses
from collections.abc import Iterable

HIGHER, LOWER, NEITHER = "higher", "lower", "neither"


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number of a picture. `better` is `higher`, `lower` or `neither`.

    `own` says that it is in the objective's own unit, so that it means something only beside the same objective.
    """

    name: str
    title: str
    better: str = NEITHER
    says: str = ""
    own: bool = False


MAIN = "gain"
_NATURAL = "÷ the best response of any photograph, by the objective’s own measure"

# In the order in which they are shown. A measure that an atlas holds beside these comes after them, by its own name.
_KNOWN = (
    Measure(MAIN, "achieved ÷ natural", HIGHER, f"activation on the saved picture {_NATURAL}"),
    Measure("robust_gain", "robust ÷ natural", HIGHER, f"mean activation over 16 shaken copies {_NATURAL}"),
    Measure("rank", "rank", LOWER, "place of the unit among its layer’s channels, by their answers to the picture"),
    Measure("agreement", "agreement", HIGHER, "how alike the layer answers to the unit’s pictures"),
    Measure("transfer", "transfer", HIGHER, "how alike the layer answers to the picture and to the unit’s photographs"),
    Measure("high_frequency", "high frequencies", LOWER, "share of the energy above ¼ cycle a pixel"),
    Measure("checkerboard", "checkerboard", LOWER, "energy at the frequencies of the network’s strides"),
    Measure("total_variation", "total variation", LOWER, "mean absolute difference of neighbouring pixels"),
    Measure("spectral_distance", "spectral distance", LOWER, "distance of the amplitude spectrum from photographs’"),
    Measure("saturated", "saturation", LOWER, "share of values at black or white"),
    Measure("activation", "activation", HIGHER, "the objective on the saved 8-bit picture, untransformed", True),
    Measure("robust", "robust", HIGHER, "the objective’s mean over 16 shaken copies", True),
    Measure("start", "start", NEITHER, "the objective before the first step", True),
    Measure("steps", "steps", NEITHER, "steps of the optimisation"),
    Measure("seconds", "seconds", LOWER, "time that the picture took, on the machine that made it"),
)
_BY_NAME = {measure.name: measure for measure in _KNOWN}


def known(name: str) -> Measure:
    """What is known of a measure; of one that nobody described here, its name alone."""
    return _BY_NAME.get(name, Measure(name, name.replace("_", " ")))


def in_order(names: Iterable[str]) -> tuple[Measure, ...]:
    """Measures as they are shown: known ones in their order, others by name before the plain activation."""
    places = {measure.name: i for i, measure in enumerate(_KNOWN)}
    unknown = places["activation"] - 0.5
    return tuple(known(name) for name in sorted(set(names), key=lambda n: (places.get(n, unknown), n)))
