"""Descriptions of the presets for the method page: text, formula and settings, from the configuration of the run.

The text of every component of a preset is the docstring of its class, so that a user's own regularizer appears on the
page like all others.
"""

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.core.config_files import stored_settings
from pipeline.core.errors import AtlasError

# Formulas of the objectives: a is the layer's output, c the unit's channel, x the image.
SYMBOLS = {
    "channel": "maxₓ  1/(HW) · Σᵢⱼ a₍c,i,j₎(x)",
    "energy": "maxₓ  1/(HW) · Σᵢⱼ (a₍c,i,j₎(x) − ā₍c₎(x))², where ā is the mean over i and j",
    "rectified": "maxₓ  1/(HW) · Σᵢⱼ max(a₍c,i,j₎(x), s · a₍c,i,j₎(x)) with the slope s",
    "auto": "maxₓ  1/(HW) · Σᵢⱼ a₍c,i,j₎(x); in layers that are linear in the pixels the energy, "
    "1/(HW) · Σᵢⱼ (a₍c,i,j₎(x) − ā₍c₎(x))²; in depthwise convolutions before a rectifier "
    "1/(HW) · Σᵢⱼ max(a₍c,i,j₎(x), 0.1 · a₍c,i,j₎(x))",
    "neuron": "maxₓ  a₍c,i,j₎(x) at one position (i, j), the center by default",
    "layer": "maxₓ  1/(CHW) · Σ a(x)²",
    "logit": "maxₓ  z₍c₎(x), the class's score before the softmax",
    "probability": "maxₓ  softmax(z(x))₍c₎",
    "log_probability": "maxₓ  log softmax(z(x))₍c₎",
    "squashed_logit": "maxₓ  σ(z₍c₎(x)) for a squashing function σ",
    "direction": "maxₓ  ⟨v, a(x)⟩ for a vector v",
    "directions": "maxₓ  ⟨vᵢ, a(x)⟩ for a vector vᵢ of each image",
    "caricature": "maxₓ  1/(HW) · Σ a(x) · a(t) · max(0.1, cos(a(x), a(t)))ᵖ for a photograph t",
    "joint": "maxₓ  Σₖ wₖ · aₖ(x) over several units",
    "facet": "maxₓ  softplus(1/(HW) · Σᵢⱼ a₍c,i,j₎(x)) · cos(z(x), f)ᵖ for the standardized response z of another "
    "layer and its mean f over a facet",
    "interpolate": "maxₓ  (1 − t) · a₁(x) + t · a₂(x)",
}

# (key in the configuration, heading, explanation)
GROUPS = (
    ("canvas", "Canvas", "The parameterization of the image: the variables that the optimizer changes."),
    ("transforms", "Transforms", "Random transformations at every step, for transformation robustness."),
    ("penalties", "Penalties", "Image regularizers, which are subtracted from the objective."),
    (
        "layer_penalties",
        "Distance from the initial image",
        "Regularizers in the space of a layer, which are subtracted from the objective.",
    ),
    ("preconditioners", "Gradient", "Operations on the gradient before each step."),
    ("augmentations", "Noise on the network", "Random perturbations of the network at every step."),
    ("couplings", "Couplings", "Terms over the several images of one unit."),
    ("network_penalties", "Penalties on activations", "Losses of what the network computes before the unit's layer."),
    ("schedule", "Schedule", "Settings that change over the steps."),
    ("optimizer", "Optimiser", "The update rule from gradients to steps."),
    ("stop", "Stop", "The condition that ends the optimization early."),
)
# Groups whose configuration is one component; the others are mappings from names to components.
SINGLE_COMPONENT_GROUPS = ("canvas", "optimizer", "stop")


@dataclasses.dataclass(frozen=True)
class Part:
    """A component of a preset: the paragraphs of its documentation, and its settings as (name, value)."""

    name: str
    text: tuple[str, ...]
    values: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """A group of a preset with its components."""

    title: str
    purpose: str
    parts: tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Preset:
    """Description of a preset.

    Attributes:
        name: Name of the preset.
        objective: The objective.
        formula: Formula of the objective, or "" if there is none in `SYMBOLS`.
        sections: The other components, by group.
        values: Settings of the preset itself, as (name, value).
    """

    name: str
    objective: Part
    formula: str
    sections: tuple[Section, ...]
    values: tuple[tuple[str, str], ...]


def describe(config: str) -> tuple[Preset, ...]:
    """Return descriptions of the presets in a configuration, given as YAML; empty if it has none or is not valid."""
    return tuple(_preset(name, settings) for name, settings in _presets(stored_settings(config)))


def _presets(tree: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (name, settings) of the run's main preset and of its additional presets."""
    additional = tree.get("also")
    candidates = [("render", tree.get("render"))]
    if isinstance(additional, Mapping):
        candidates += additional.items()
    for key, settings in candidates:
        if isinstance(settings, Mapping) and "objective" in settings:
            yield str(settings.get("name", key)), settings


def _preset(name: str, tree: Mapping[str, Any]) -> Preset:
    registries = _registries()
    sections = []
    for key, title, purpose in GROUPS:
        components = _components(tree.get(key), key)
        parts = tuple(_part(registries.get(key), component, settings) for component, settings in components)
        if parts:
            sections.append(Section(title, purpose, parts))
    described = {"objective", *(key for key, _, _ in GROUPS)}
    values = tuple((str(k), _plain(v)) for k, v in tree.items() if k not in described and not isinstance(v, Mapping))
    objective = tree.get("objective")
    if not isinstance(objective, Mapping):
        objective = {"name": str(objective)}
    kind = str(objective.get("name", ""))
    formula = SYMBOLS.get(kind, "")
    if tree.get("negative"):
        formula = formula.replace("maxₓ", "minₓ")
    return Preset(name, _part(registries.get("objective"), kind, objective), formula, tuple(sections), values)


def _components(group: Any, key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Return (name, settings) of each component in the configuration of a group."""
    if not isinstance(group, Mapping):
        return []
    if key in SINGLE_COMPONENT_GROUPS:
        return [(str(group["name"]), group)] if "name" in group else []
    components = []
    for name, settings in group.items():
        settings = settings if isinstance(settings, Mapping) else {}
        components.append((str(settings.get("name", name)) if key != "schedule" else str(name), settings))
    return components


def _part(registry: Any, name: str, settings: Mapping[str, Any]) -> Part:
    text: tuple[str, ...] = ()
    if registry is not None:
        try:
            text = _paragraphs(inspect.getdoc(registry[name]) or "")
        except AtlasError:  # a component of another version, or one that a user registered
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


def _registries() -> Mapping[str, Any]:
    # Imported here because this module imports PyTorch, which nothing else of the site needs.
    from pipeline.visualization.preset import KEYED_GROUPS, SINGLE_GROUPS

    return SINGLE_GROUPS | KEYED_GROUPS
