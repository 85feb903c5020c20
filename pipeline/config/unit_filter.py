"""The condition of `only=`: which units of a former run are rendered again."""

import dataclasses

from pipeline.core.errors import AtlasError, nearest_names

STATUSES = ("converged", "limit", "retried", "restarted", "failed")


@dataclasses.dataclass(frozen=True)
class UnitFilter:
    """A condition on a unit's pictures: `status` of any of them, or achieved ÷ natural of the best `below` a number."""

    status: str = ""
    below: float | None = None

    @classmethod
    def of(cls, text: str) -> "UnitFilter":
        """`failed` or another status, or `below:1.0`; raises `AtlasError` for anything else."""
        if text in STATUSES:
            return cls(text)
        word, _, number = text.partition(":")
        if word == "below":
            try:
                return cls(below=float(number))
            except ValueError:
                raise AtlasError(f"only={text}: below needs a number, as in only=below:1.0.") from None
        raise AtlasError(f"only={text!r} is unknown. {nearest_names(text, (*STATUSES, 'below:1.0'))}")
