"""The plan of a study, as written in plans/NAME.yaml before its run: question, arms, hypotheses and exclusions."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field

from pipeline.cli.compose import compose
from pipeline.config.schema import Config
from pipeline.layers.selection import list_layers, select_layers
from pipeline.models.loading import load_model

PLANS = Path(__file__).resolve().parent / "plans"
# Parts of a configuration that do not change what is measured.
PLACES = ("run", "engine", "site", "data", "units", "base")
STRICT = pydantic.ConfigDict(extra="forbid", strict=True)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the presets that a study compares.

    Attributes:
        preset: Choice of `render`.
        groups: Choices of its groups, for example transforms: none.
        settings: Its settings, for example steps: 96.
        added: Settings that its YAML does not have, for example transforms.jitter: {}.
        removed: Settings to remove, for example transforms.jitter.
    """

    __pydantic_config__ = STRICT

    preset: str
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    added: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    removed: tuple[str, ...] = ()

    def overrides(self, name: str, first: bool, shared: Mapping[str, Any]) -> list[str]:
        """Return the arm as arguments of the command line: as the main preset, or as one of `also`."""
        section, at = ("render", "") if first else (f"also.{name}", f"@also.{name}")
        chosen = [f"render={self.preset}"] if first else [f"+render@also.{name}={self.preset}"]
        for group, choice in self.groups.items():
            chosen.append(f"render/{group}={choice}" if first else f"render/{group}{at}.{group}={choice}")
        values = {"name": name, **shared, **self.settings}
        chosen += [f"{section}.{key}={_typed(value)}" for key, value in values.items()]
        chosen += [f"+{section}.{key}={_typed(value)}" for key, value in self.added.items()]
        return chosen + [f"~{section}.{key}" for key in self.removed]


def _typed(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_typed(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_typed(v) for v in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A statement that a study tests.

    Attributes:
        statement: The statement, as a sentence without its period.
        measure: Column of the table of values.
        arm: The arm it is about; CONDITION/ARM where a study has conditions.
        against: The arm it is compared with over the same units, or a number; None for a trend over depth.
        expected: Direction of the difference or of the trend.
        minimal: Least difference that matters, in units of the measure; for a ratio, the factor − 1; for a trend, a
            rank correlation.
        scale: "difference", or "ratio" for the logarithm of the quotient.
        layers: Layers it is about; empty for all.
    """

    __pydantic_config__ = STRICT

    statement: str
    measure: str
    arm: str
    expected: Literal["higher", "lower"]
    minimal: Annotated[float, Field(ge=0, strict=False)]
    against: str | Annotated[float, Field(strict=False)] | None = None
    scale: Literal["difference", "ratio"] = "difference"
    layers: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Figure:
    """The figure of a page: one unit of each of some layers under each arm, or what the study's own code draws.

    Attributes:
        caption: What it shows, complete without the text.
        arms: Arms that are shown; empty for all.
        network: Network whose units are shown; empty for the first.
        variants: Number of images of each unit and arm that are shown.
    """

    __pydantic_config__ = STRICT

    caption: str
    arms: tuple[str, ...] = ()
    network: str = ""
    variants: int = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a study.

    Attributes:
        number: Position in the index.
        title: Title of the page.
        question: The question, one sentence.
        rows: Rows of the coverage table that it answers.
        background: Where the question comes from.
        method: The method in five lines or less.
        limits: What the study cannot say.
        figure: The figure.
        hypotheses: Statements by identifier.
        measures: Columns of the table of medians: title by column of the table of values.
        arms: Presets by name.
        layers: Layers whose units are compared: patterns, the same for all networks or by network.
        networks: Choices of `model`, or identifiers with overrides.
        units: Number of units drawn in each layer, the same for all arms; 0 if the study selects its units by settings.
        seeds: Number of starts of each unit and arm.
        conditions: Further overrides by name, for example random weights; arms are then called CONDITION/ARM.
        settings: Overrides of all runs.
        shared: Settings of all arms, for example steps.
        verb: Verb of the command line.
        photographs: Whether it needs the user's photographs (`data=folder data.root=…`) instead of the packaged images.
        unit_name: What a row of the table of values is, where the study's own code makes other rows than units.
        cluster: Column by which units are clustered in tests: "layer", or "channel" for classes.
    """

    __pydantic_config__ = STRICT

    number: int
    title: str
    question: str
    background: str
    method: str
    limits: str
    figure: Figure
    hypotheses: Mapping[str, Hypothesis]
    measures: Mapping[str, str]
    rows: tuple[int, ...] = ()
    arms: Mapping[str, Arm] = dataclasses.field(default_factory=dict)
    layers: tuple[str, ...] | Mapping[str, tuple[str, ...]] = ()
    networks: tuple[str, ...] | Mapping[str, tuple[str, ...]] = ("efficientnet_lite0", "efficientnet_lite2")
    units: int = 6
    seeds: int = 3
    conditions: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: {"": ()})
    settings: tuple[str, ...] = ()
    shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    verb: Literal["run", "examples"] = "run"
    photographs: bool = False
    unit_name: str = "units"
    cluster: Literal["layer", "channel"] = "layer"

    @property
    def network_names(self) -> tuple[str, ...]:
        """Names of the networks."""
        return tuple(self.networks)

    def network_overrides(self, network: str) -> list[str]:
        """Return the overrides that choose a network."""
        if isinstance(self.networks, Mapping):
            return list(self.networks[network])
        return [f"model={network}"]

    def patterns(self, network: str) -> list[str]:
        """Return the patterns of the layers of a network."""
        return list(self.layers[network] if isinstance(self.layers, Mapping) else self.layers)

    def overrides(self, network: str, condition: str) -> list[str]:
        """Return the arguments of a run, but for its units, its name and the user's settings."""
        chosen = [*self.network_overrides(network), *self.settings, *self.conditions[condition]]
        shared = {"variants": self.seeds, **self.shared} if self.arms else {}
        for i, (name, arm) in enumerate(self.arms.items()):
            chosen += arm.overrides(name, i == 0, shared)
        return chosen

    def is_seed(self, condition: str) -> bool:
        """Return whether a condition is a further seed of the same arms, over which is averaged."""
        return condition.startswith("seed")

    def arm_name(self, condition: str, preset: str) -> str:
        """Return the name of an arm: PRESET, CONDITION, or CONDITION/PRESET."""
        named = "" if self.is_seed(condition) else condition
        return f"{named}/{preset}" if named and self.arms else named or preset

    def run_name(self, name: str, network: str, condition: str) -> str:
        """Return the name of a run folder."""
        return "-".join(part for part in ("study", name, network, condition) if part)


def read_plan(name: str) -> Plan:
    """Read plans/NAME.yaml.

    Raises:
        SystemExit: If there is no such plan, or if it is not valid.
    """
    path = PLANS / f"{name}.yaml"
    if not path.is_file():
        raise SystemExit(f"There is no study {name!r}: {' '.join(plan_names())}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        # JSON mode: YAML has lists where the plan has tuples.
        return pydantic.TypeAdapter(Plan).validate_json(json.dumps(tree))
    except pydantic.ValidationError as error:
        raise SystemExit(f"{path}: {error}") from None


def plan_names() -> list[str]:
    """Return the names of all studies, in the order of the index."""
    found = [path.stem for path in PLANS.glob("*.yaml")]
    return sorted(found, key=lambda name: (read_plan(name).number, name))


def draw_units(plan: Plan, name: str, network: str, config: Config) -> list[tuple[str, int]]:
    """Draw the units of a network: the same number in each layer, by a seed that the identity of the layer determines.

    Args:
        plan: The plan.
        name: Name of the study.
        network: Name of the network.
        config: Configuration of a run of this network, with the layers as `layers.include`.
    """
    model = load_model(config.model)
    layers = select_layers(model, list_layers(model, config.layers), config.layers)
    drawn = []
    for layer in layers:
        generator = random.Random(f"study {name} {network} {layer.name} {config.run.seed}")
        channels = generator.sample(range(layer.channels), min(plan.units, layer.channels))
        drawn += [(layer.name, channel) for channel in sorted(channels)]
    return drawn


def settings_digest(plan: Plan, settings: Sequence[str] = ()) -> str:
    """Return a digest of everything that determines the results of a study, but for code and data.

    Args:
        plan: The plan.
        settings: The user's settings.
    """
    trees = []
    for network in plan.network_names:
        for condition in plan.conditions:
            tree = dict(compose([*plan.overrides(network, condition), *settings]).tree)
            trees.append([network, condition, {key: value for key, value in tree.items() if key not in PLACES}])
    tested = {key: dataclasses.asdict(value) for key, value in plan.hypotheses.items()}
    content = [trees, plan.units, plan.seeds, plan.patterns(plan.network_names[0]), tested]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]
