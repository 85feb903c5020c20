"""How the pictures were made, told from the configuration in words, symbols and values.

Every part of a preset is a small class whose docstring says what it does and where it comes from; the page takes it
from there, so that a regularizer of a user's own is on it like all others.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from pipeline.core.errors import AtlasError

# What is maximised, in symbols: a is the layer's output, c the unit's channel, x the picture.
SYMBOLS = {
    "channel": "maxₓ  1/(HW) · Σᵢⱼ a₍c,i,j₎(x)",
    "neuron": "maxₓ  a₍c,i,j₎(x) at one place (i, j), the centre if none is named",
    "layer": "maxₓ  1/(CHW) · Σ a(x)²",
    "logit": "maxₓ  z₍c₎(x), the class's score before the softmax",
    "probability": "maxₓ  softmax(z(x))₍c₎",
    "log_probability": "maxₓ  log softmax(z(x))₍c₎",
    "direction": "maxₓ  ⟨v, a(x)⟩ for a vector v",
    "joint": "maxₓ  Σₖ wₖ · aₖ(x) over several units",
    "interpolate": "maxₓ  (1 − t) · a₁(x) + t · a₂(x)",
}

GROUPS = (
    ("canvas", "Canvas", "How the picture is written down while it is made: what the optimiser moves."),
    ("transforms", "Transforms", "How it is shaken at every step, so that only what survives shaking is learned."),
    ("penalties", "Penalties", "What is subtracted from the objective."),
    ("preconditioners", "Gradient", "What is done to the gradient before a step."),
    ("augmentations", "Noise on the network", "What is done to the network itself while it looks."),
    ("couplings", "Couplings", "What joins the pictures of one unit."),
    ("schedule", "Schedule", "What changes over the steps."),
    ("optimizer", "Optimiser", "How a gradient becomes a step."),
    ("stop", "Stop", "When it is enough."),
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One member of a group: what its documentation says, by paragraph, and its settings as (name, value)."""

    name: str
    text: tuple[str, ...]
    values: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of a preset with its members."""

    title: str
    purpose: str
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Preset:
    """A preset in words: the objective, its formula, everything else by group, and its plain settings."""

    name: str
    objective: Part
    formula: str
    sections: tuple[Section, ...]
    values: tuple[tuple[str, str], ...]


def tell(config: str) -> tuple[Preset, ...]:
    """The presets of a configuration, given as YAML; none if it holds none that can be told."""
    try:
        tree = yaml.safe_load(config)
    except yaml.YAMLError:
        return ()
    return tuple(_preset(name, found) for name, found in _presets(tree if isinstance(tree, Mapping) else {}))


def _presets(tree: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The run's main preset, and those that it has beside it."""
    main, also = tree.get("render"), tree.get("also")
    for key, found in [("render", main), *(also.items() if isinstance(also, Mapping) else ())]:
        if isinstance(found, Mapping) and "objective" in found:
            yield str(found.get("name", key)), found


def _preset(name: str, tree: Mapping[str, Any]) -> Preset:
    registries = _registries()
    sections = []
    for key, title, purpose in GROUPS:
        held = tree.get(key)
        members = _members(held, key)
        parts = tuple(_part(registries.get(key), member, settings) for member, settings in members)
        if parts:
            sections.append(Section(title, purpose, parts))
    told = {"objective", *(key for key, _, _ in GROUPS)}
    values = tuple((str(k), _plain(v)) for k, v in tree.items() if k not in told and not isinstance(v, Mapping))
    held = tree.get("objective")
    objective = held if isinstance(held, Mapping) else {"name": str(held)}
    kind = str(objective.get("name", ""))
    formula = SYMBOLS.get(kind, "")
    if tree.get("negative"):
        formula = formula.replace("maxₓ", "minₓ")
    return Preset(name, _part(registries.get("objective"), kind, objective), formula, tuple(sections), values)


def _members(held: Any, key: str) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(held, Mapping):
        return []
    if key in ("canvas", "optimizer", "stop"):
        return [(str(held["name"]), held)] if "name" in held else []
    found = []
    for name, settings in held.items():
        settings = settings if isinstance(settings, Mapping) else {}
        found.append((str(settings.get("name", name)) if key != "schedule" else str(name), settings))
    return found


def _part(registry: Any, name: str, settings: Mapping[str, Any]) -> Part:
    text: tuple[str, ...] = ()
    if registry is not None:
        try:
            text = _paragraphs(inspect.getdoc(registry[name]) or "")
        except AtlasError:  # from another version, or somebody's own
            text = ()
    values = tuple((str(k), _plain(v)) for k, v in settings.items() if k != "name" and v not in (None, [], {}))
    return Part(name, text, values)


def _paragraphs(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.replace("`", "")) if part.strip())


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return "; ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return str(value)


def _registries() -> dict[str, Any]:
    # These bring PyTorch along, which nothing else of the site needs.
    from pipeline.visualization.batch_terms import COUPLINGS
    from pipeline.visualization.gradient_preconditioners import PRECONDITIONERS
    from pipeline.visualization.image_regularizers import PENALTIES
    from pipeline.visualization.network_perturbations import AUGMENTATIONS
    from pipeline.visualization.objectives import OBJECTIVES
    from pipeline.visualization.optimizers import OPTIMIZERS
    from pipeline.visualization.parameterizations import CANVASES
    from pipeline.visualization.schedules import STOPS
    from pipeline.visualization.transforms import TRANSFORMS

    return {
        "objective": OBJECTIVES, "canvas": CANVASES, "transforms": TRANSFORMS, "penalties": PENALTIES,
        "preconditioners": PRECONDITIONERS, "augmentations": AUGMENTATIONS, "couplings": COUPLINGS,
        "optimizer": OPTIMIZERS, "stop": STOPS,
    }  # fmt: skip
