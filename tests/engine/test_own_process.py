"""Functions in a process of their own: results and errors come back, and a process that dies is an error, too."""

import os

import pytest

from pipeline.core.errors import AtlasError, nearest_names
from pipeline.core.units import Unit
from pipeline.engine.own_process import OwnProcessError, in_own_process


def test_results_and_errors_come_back() -> None:
    assert in_own_process(os.getpid) != os.getpid()
    assert "Nearest: conv1" in in_own_process(nearest_names, "conv", valid=["conv1", "head"])
    with pytest.raises(OwnProcessError, match=r"FileNotFoundError.*no_such_file"):
        in_own_process(os.stat, "no_such_file")


def test_a_process_that_dies_is_an_error() -> None:
    with pytest.raises(OwnProcessError, match="ended with code 3"):
        in_own_process(os._exit, 3)


def test_errors_of_the_input_stay_what_they_are() -> None:
    with pytest.raises(AtlasError):
        in_own_process(Unit.parse, "no unit")
