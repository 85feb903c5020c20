"""Every YAML composes, has a reason on top, and what the schema does not know is refused."""

import dataclasses

import pytest
from conftest import compose

from pipeline.cli.overrides import conf_folder
from pipeline.config.schema import differences, from_tree
from pipeline.core.errors import AtlasError

CHOICES = sorted(
    str(path.relative_to(conf_folder()).with_suffix(""))
    for path in conf_folder().rglob("*.yaml")
    if path.parent != conf_folder()
)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes(choice: str) -> None:
    # An experiment may lie in a folder below its group; render's groups have names of two words.
    group, _, name = choice.partition("/") if choice.startswith("experiment/") else choice.rpartition("/")
    request = compose([f"{group}={name}"])
    assert dataclasses.is_dataclass(request.config)
    assert "/" not in request.config.run.name


@pytest.mark.parametrize("choice", ["config", *CHOICES])
def test_every_yaml_opens_with_its_reason(choice: str) -> None:
    lines = (conf_folder() / f"{choice}.yaml").read_text().splitlines()
    first = next(line for line in lines if not line.startswith("# @package"))
    assert first.startswith("# ") and len(first) > 30


def test_default_run_has_a_name_of_its_own() -> None:
    assert compose([]).config.run.name == "efficientnet_lite0-distill"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("render.steps=many", "render.steps='many' has the wrong type"),
        ("+render.stepz=3", "render.stepz is not a setting. Nearest: steps"),
        ("+render.canvas.decai=2", "render.canvas.decai is not a setting. Nearest: decay"),
        ("render.canvas.name=furier", "There is no canvas 'furier'. Nearest: fourier"),
        ("+render.transforms.wobble={}", "There is no transform 'wobble'"),
        ("examples.k=0", "examples.k=0 is too small"),
        ("engine.workers=some", "engine.workers='some': use auto or a number"),
        ("render.size=huge", "render.size='huge': use auto, field, or pixels"),
        ("run.name=../else", "must be a plain folder name"),
        ("layers.include=3", "layers.include=3 has the wrong type"),
    ],
)
def test_what_the_schema_does_not_know_is_refused(override: str, message: str) -> None:
    with pytest.raises(AtlasError) as error:
        compose([override])
    assert message in str(error.value)


def test_transforms_keep_their_order_and_may_come_twice() -> None:
    transforms = compose([]).config.render.transforms
    assert [type(t).__name__ for t in transforms] == ["Jitter", "Scale", "Rotate", "Jitter"]
    assert len(compose(["~render.transforms.scale"]).config.render.transforms) == 3


def test_no_transforms_at_all() -> None:
    assert compose(["render/transforms=none"]).config.render.transforms == ()


def test_differences_name_the_key_and_both_values() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}, "d": 4}) == ["a.b: 1 → 3", "d: None → 4"]


def test_a_config_survives_the_text_it_is_kept_as() -> None:
    import yaml

    request = compose(["layers.channels=[3,7]"])
    assert from_tree(yaml.safe_load(request.text)) == request.config
