"""Every YAML composes, has a reason on top, and what the schema does not know is refused."""

import dataclasses
from typing import Any

import pytest
import yaml
from conftest import compose

from pipeline.cli.overrides import conf_folder
from pipeline.config.defaults import defaults
from pipeline.config.schema import EngineConfig, differences, from_tree
from pipeline.core.errors import AtlasError
from pipeline.data.config import DataConfig
from pipeline.examples.sweep import ExamplesConfig
from pipeline.layers.selection import LayersConfig
from pipeline.site.config import SiteConfig
from pipeline.visualization.optimizers import OPTIMIZERS
from pipeline.visualization.preset import KEYED_GROUPS, SINGLE_GROUPS

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
        ("render.size=huge", "render.size='huge': use auto, field, input, or pixels"),
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
    request = compose(["layers.channels=[3,7]"])
    assert from_tree(yaml.safe_load(request.text)) == request.config


def members() -> list[tuple[str, str]]:
    """The files of `conf/render/GROUP/` whose contents are members of a registry."""
    paths = sorted((conf_folder() / "render").glob("*/*.yaml"))
    return [(path.parent.name, path.stem) for path in paths if path.parent.name in (*SINGLE_GROUPS, *KEYED_GROUPS)]


@pytest.mark.parametrize(("group", "name"), members())
def test_yaml_files_state_only_what_differs_from_the_class(group: str, name: str) -> None:
    stated: Any = yaml.safe_load((conf_folder() / "render" / group / f"{name}.yaml").read_text())
    choice = f"render/{group}={name}" if group in SINGLE_GROUPS or group == "transforms" else f"render/{group}=[{name}]"
    composed = getattr(compose([choice]).config.render, group)
    entries = [(name, stated)] if group in SINGLE_GROUPS else list(stated.items())
    values = [composed] if group in SINGLE_GROUPS else list(composed)
    registry = (SINGLE_GROUPS | KEYED_GROUPS)[group]
    assert len(entries) == len(values)
    for (key, entry), value in zip(entries, values, strict=True):
        own = {k: v for k, v in entry.items() if k != "name"}
        kind = registry[entry.get("name", key)]
        assert type(value) is kind
        preset = defaults(kind)
        assert not [k for k, v in own.items() if k in preset and preset[k] == v], "the class says the same"
        plain = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        given = {f.name: f.default for f in dataclasses.fields(kind) if f.name not in own}
        assert {k: plain[k] for k in given} == given


@pytest.mark.parametrize(
    ("group", "kind"), [("engine", EngineConfig), ("examples", ExamplesConfig), ("site", SiteConfig)]
)
def test_sections_have_the_defaults_of_their_classes(group: str, kind: type) -> None:
    assert getattr(compose([]).config, group) == kind()


# Keys that the files of a group are there to set.
OWN = {"layers": (LayersConfig, {"policy", "channels"}), "data": (DataConfig, {"source", "root"})}


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice.partition("/")[0] in OWN])
def test_choices_differ_from_the_class_in_their_own_keys_only(choice: str) -> None:
    group, _, name = choice.partition("/")
    kind, own = OWN[group]
    composed = getattr(compose([f"{group}={name}"]).config, group)
    expected = {f.name: f.default for f in dataclasses.fields(kind) if f.name not in own}
    assert {key: getattr(composed, key) for key in expected} == expected


def test_every_default_is_a_key_of_the_composed_configuration() -> None:
    """So that an override needs no `+`, and a run stores all values."""
    request = compose(["render.canvas.decay=1.5", "render.transforms.scale.values=[1,2]", "render/optimizer=adamw"])
    render = request.tree["render"]
    assert render["canvas"]["decay"] == 1.5 and render["canvas"]["spectrum"] == "default"
    assert request.config.render.transforms[1].values == (1.0, 2.0)
    assert render["optimizer"] == {"name": "adamw", **defaults(OPTIMIZERS["adamw"])}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("render.optimizer.lr=inf", "render.optimizer.lr=inf must be a finite number"),
        ("render.optimizer.lr=0", "render.optimizer.lr=0 must be above 0"),
        ("render.canvas.colour=blue", "render.canvas.colour='blue' is not one of plain, decorrelated, measured"),
        ("render.transforms.jitter.pixels=1.5", "render.transforms.jitter.pixels=1.5 has the wrong type: int is"),
        ("+render.transforms.jitter.sd=1", "render.transforms.jitter.sd is not a setting. Valid: pixels."),
        ("render.canvas.decay='1'", "render.canvas.decay='1' has the wrong type: float is needed."),
        ("run.seed=true", "run.seed=True has the wrong type: int is needed."),
        ("layers.include=[3]", "layers.include[0]=3 has the wrong type: str is needed."),
        ("model.input_size=[1,a]", "model.input_size=[1, 'a'] has the wrong type: int or a list of int is needed."),
        ("layers.channels=1.5", "layers.channels=1.5 has the wrong type: str or int or a list is needed."),
        ("data.limit=0", "data.limit=0 is too small: at least 1, or null for all."),
        ("site.quality=101", "site.quality=101 is too large: at most 100."),
        ("site.max_bytes=5", "site.max_bytes=5 is too small: at least 1,000,000."),
        ("engine.name=slurm", "engine.name='slurm' is not one of ray, inline."),
        ("engine.batch=0", "engine.batch=0: use auto or a number above 0."),
        ("engine.device=mps", "engine.device='mps': use auto, cpu, cuda or, inline, cuda:N."),
        ("engine.gpus_per_worker=-1", "engine.gpus_per_worker=-1: use auto or a number above 0."),
        ("~render.objective", "render.objective is missing."),
        ("render.objective=null", "render.objective needs a `name`: one of auto, caricature, "),
        ("+engine.worker=3", "engine.worker is not a setting. Nearest: workers"),
    ],
)
def test_messages_name_the_key_and_what_is_needed(override: str, message: str) -> None:
    with pytest.raises(AtlasError) as error:
        compose([override])
    assert str(error.value).startswith(message)


def test_numbers_of_yaml_keep_working() -> None:
    """Integers for floats, lists for tuples, and infinity."""
    config = compose(["engine.patience=inf", "render.canvas.decay=2", "examples.spectrum=[0,50,100]"]).config
    assert config.engine.patience == float("inf")
    assert isinstance(config.render.canvas.decay, float) and config.examples.spectrum == (0.0, 50.0, 100.0)


# Device, channels of the layer, variants, images of a batch, channels of a batch.
BATCHES = [
    ("cpu", 16, 1, 16, 16),
    ("cpu", 2048, 1, 16, 16),
    ("cpu", 512, 4, 16, 4),
    ("cpu", 512, 20, 16, 1),
    ("cuda", 32, 1, 64, 64),
    ("cuda", 64, 1, 64, 64),
    ("cuda", 65, 1, 128, 128),
    ("cuda:1", 2048, 1, 128, 128),
    ("cuda", 512, 4, 128, 32),
    ("cuda", 64, 4, 64, 16),
]


@pytest.mark.parametrize(("device", "channels", "variants", "images", "together"), BATCHES)
def test_batches_follow_from_device_channels_and_variants(
    device: str, channels: int, variants: int, images: int, together: int
) -> None:
    config = compose([f"render.variants={variants}"]).config
    assert config.engine.batch == "auto"
    assert config.engine.images_per_batch(channels, device) == images
    assert config.channels_per_batch(config.render, channels, device) == together
    # A number is one everywhere.
    config = compose([f"render.variants={variants}", "engine.batch=40"]).config
    assert config.engine.images_per_batch(channels, device) == 40
    assert config.channels_per_batch(config.render, channels, device) == 40 // variants
