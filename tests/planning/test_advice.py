"""Advice on layers whose channels are no more than directions."""

from pathlib import Path

import numpy as np
import pytest
from conftest import compose

from pipeline.cli.main import main
from pipeline.layers.finding import Layer
from pipeline.planning.advice import known_rotation_numbers, linear_output_advice
from pipeline.store.hdf5 import create_file, write_array

LINEAR = [Layer(f"block.{i}", "block", f"block.{i}", 1, "out", "maps", 8, 4, 4, 1.0, rectified=False) for i in range(5)]
CONV = Layer("conv", "conv", "conv", 1, "out", "maps", 8, 4, 4, 1.0)
STEM = Layer("stem", "conv", "stem", 1, "out", "maps", 8, 4, 4, 1.0, rectified=False, linear_in_pixels=True)
HEAD = Layer("head", "linear", "head", 1, "out", "vector", 8, 1, 1, 1.0, rectified=False)


def test_linear_outputs_are_named_with_their_rotation_number_and_the_fix() -> None:
    config = compose([]).config
    said = linear_output_advice(config, LINEAR, (), {"block.0": 0.04, "block.1": 0.06, "conv": 0.9})
    assert said.startswith("All layers of this plan are linear outputs (block.0, block.1, block.2 and 2 more)")
    assert "median rotation number is 5 %" in said and "also=[negative]" in said and "layers=tour" in said
    some = linear_output_advice(config, [STEM, CONV, LINEAR[0], HEAD], ("head",), {})
    assert some.startswith("1 of 4 layers are linear outputs (block.0)") and "rotation number" not in some


def test_units_kernels_and_classes_need_no_advice() -> None:
    assert linear_output_advice(compose([]).config, [STEM, CONV, HEAD], ("head",), {}) == ""


def test_negatives_are_advised_only_where_they_are_missing() -> None:
    assert "also=[negative]" not in linear_output_advice(
        compose(["+render@also.negative=negative"]).config, LINEAR, (), {}
    )
    config = compose(["experiment=residual"]).config
    assert [preset.name for preset in config.presets] == ["distill", "negative"] and config.layers.policy == "residual"


def test_rotation_numbers_come_from_atlases_of_the_same_network(tmp_path: Path) -> None:
    with create_file(tmp_path / "atlas.h5") as file:
        file.attrs.update(
            schema="neuron-atlas", schema_version=5, model="made", weights_sha256="ab", versions="{}", created=""
        )
        for order, (name, number) in enumerate((("block.0", 0.04), ("block.1", np.nan))):
            group = file.create_group(f"layers/{name}")
            group.attrs.update(name=name, order=order, kind="block", channels=8, map_height=4, map_width=4)
            write_array(group, "channels", np.arange(2, dtype=np.int32))
            write_array(group, "stats/max", np.ones(2, np.float32))
            group["stats"].attrs["rotation_number"] = number
    assert known_rotation_numbers([tmp_path / "other", tmp_path], "ab") == {"block.0": 0.04}
    assert known_rotation_numbers([tmp_path], "cd") == {}


def test_without_an_atlas_no_rotation_number_is_known(tmp_path: Path) -> None:
    assert known_rotation_numbers([tmp_path], "0" * 64) == {}


def test_the_plan_of_linear_outputs_says_so(tiny_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    settings = [setting for setting in tiny_run if not setting.startswith("layers")]
    assert main(["plan", *settings, "layers.include=[blocks.1.0]", "layers.channels='0:2'"]) == 0
    told = capsys.readouterr()
    assert "linear outputs (blocks.1.0)" in told.out + told.err
