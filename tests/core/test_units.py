"""Units as text: layer:channel."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.core.errors import AtlasError
from pipeline.core.units import Unit


@given(st.text(min_size=1), st.integers(0, 2**40))
@example("a:b.c", 12)
@example(":", 0)
@example("line\nbreak", 1)
def test_parsing_is_the_inverse_of_writing(layer: str, channel: int) -> None:
    unit = Unit(layer, channel)
    assert Unit.parse(str(unit)) == unit == Unit.parse(f"{unit}") and Unit.split(str(unit)) == (layer, str(channel))


@pytest.mark.parametrize(
    "text", ["", "conv", ":3", "conv:", "conv:-1", "conv:1.0", "conv: 1", "conv:x", "conv:1\n", "conv:²"]
)
def test_other_text_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(AtlasError, match=r"is not a unit: write layer:channel, e\.g\. blocks\.3\.0:17"):
        Unit.parse(text)


def test_units_are_ordered_by_layer_and_channel() -> None:
    assert sorted([Unit("b", 1), Unit("a", 10), Unit("a", 9)]) == [("a", 9), ("a", 10), ("b", 1)]
