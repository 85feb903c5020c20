"""Find and open the runs to compare, and check that they can be compared."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.config_files import stored_settings
from pipeline.core.errors import AtlasError, nearest_names
from pipeline.core.metric_specs import is_minimized
from pipeline.store.reader import Atlas, check_structure, open_atlas

# Attributes that must be equal for the numbers of two runs to be comparable, with their names on pages and in messages.
SHARED = {"model": "model", "weights_sha256": "weights", "dataset_fingerprint": "dataset"}


@dataclasses.dataclass(frozen=True)
class Contender:
    """The feature visualizations of one run by one preset.

    Attributes:
        label: Short name, unique in the comparison.
        run: Name of the run.
        preset: Name of the preset.
        path: File of the atlas.
        objective: Names of the objectives; layers can differ.
        reference: Statistic over the dataset that activations are divided by: mean, max, least, min or empty; see
            `LayerView.render_attributes`.
        created: Time at which the atlas was created.
        settings: Settings of the preset as text, by dotted key.
        layer_objectives: Name of the objective and statistic of the dataset, by layer.
    """

    label: str
    run: str
    preset: str
    path: Path
    objective: str
    reference: str
    created: str
    settings: Mapping[str, str]
    layer_objectives: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)

    def has_objectives_of(self, other: "Contender") -> bool:
        """Return whether both have the same objective in every layer that both have."""
        common = self.layer_objectives.keys() & other.layer_objectives.keys()
        return all(self.layer_objectives[name] == other.layer_objectives[name] for name in common)

    @property
    def negative(self) -> bool:
        """Whether the objective was minimized."""
        return is_minimized(self.reference)


@dataclasses.dataclass(frozen=True)
class RunComparison:
    """Inputs of a comparison.

    Attributes:
        contenders: The contenders.
        atlases: The open atlas of each contender; contenders of the same run share it.
    """

    contenders: tuple[Contender, ...]
    atlases: tuple[Atlas, ...]

    @property
    def first(self) -> Atlas:
        """The first atlas; read for attributes that all atlases have in common."""
        return self.atlases[0]


def find_atlas(name: str, root: Path) -> Path:
    """Return the `atlas.h5` of a run.

    Args:
        name: Name of a run below `root`, its folder, or the file itself.
        root: Folder of runs.

    Raises:
        AtlasError: If there is no such run, with the most similar names, or it has no atlas yet.
    """
    for place in (root / name, Path(name)):
        if place.is_file():
            return place
        if (place / "atlas.h5").is_file():
            return place / "atlas.h5"
        if (place / "config.yaml").is_file():
            raise AtlasError(f"The run {place} is unfinished, without an atlas.h5. Finish it with `atlas run`.")
    folder = Path(name).parent if Path(name).parent != Path() else root
    runs = sorted(p.parent.name for p in folder.glob("*/atlas.h5"))
    raise AtlasError(f"There is no run {name!r} in {folder}. {nearest_names(Path(name).name, runs)}")


@contextlib.contextmanager
def open_runs(runs: Sequence[str], presets: Sequence[str] = (), root: Path = Path("runs")) -> Iterator[RunComparison]:
    """Open the atlases of the runs to compare.

    Args:
        runs: Names, folders or files of runs.
        presets: Presets to compare; all if empty.
        root: Folder of runs.

    Yields:
        One contender for each run and each preset that the run has.

    Raises:
        AtlasError: If a run does not exist, no run has one of the presets, the runs differ in model, weights or
            dataset, or there are fewer than two contenders.
    """
    paths = list(dict.fromkeys(find_atlas(name, root).resolve() for name in runs))
    with contextlib.ExitStack() as stack:
        for path in paths:
            check_structure(path)
        atlases = [stack.enter_context(open_atlas(path)) for path in paths]
        for atlas in atlases[1:]:
            _check_comparable(atlases[0], atlas)
        available = [_presets(atlas) for atlas in atlases]
        all_presets = list(dict.fromkeys(preset for names in available for preset in names))
        for preset in presets:
            if preset not in all_presets:
                raise AtlasError(f"No run has the preset {preset!r}. {nearest_names(preset, all_presets)}")
        chosen = [
            (atlas, preset)
            for atlas, names in zip(atlases, available, strict=True)
            for preset in presets or names
            if preset in names
        ]
        if len(chosen) < 2:
            what = f"only {_place(chosen[0][0].path)} with preset {chosen[0][1]}" if chosen else "nothing"
            raise AtlasError(
                f"A comparison needs two runs, or one run with two presets, but there is {what}. "
                "Use `atlas compare runs=[one,other]`."
            )
        labels = _labels([(atlas.path, preset) for atlas, preset in chosen])
        contenders = [_contender(atlas, preset, label) for (atlas, preset), label in zip(chosen, labels, strict=True)]
        yield RunComparison(tuple(contenders), tuple(atlas for atlas, _ in chosen))


def _check_comparable(first: Atlas, second: Atlas) -> None:
    """Raise an error unless both atlases show the same network and were computed from the same dataset."""
    differing = [
        f"{word} ({key}): {_short(first.attributes.get(key))} and {_short(second.attributes.get(key))}"
        for key, word in SHARED.items()
        if first.attributes.get(key) != second.attributes.get(key)
    ]
    if differing:
        raise AtlasError(
            f"{_place(first.path)} and {_place(second.path)} cannot be compared. They differ in\n  "
            + "\n  ".join(differing)
        )


def _short(value: Any) -> str:
    """Return the first 16 characters of a digest."""
    return "none" if value is None else str(value)[:16] or "none"


def _place(path: Path) -> Path:
    """Return the folder of the run, or the file if it has another name than atlas.h5."""
    return path.parent if path.name == "atlas.h5" else path


def _presets(atlas: Atlas) -> list[str]:
    return list(dict.fromkeys(preset for layer in atlas for preset in layer.presets))


def _labels(contenders: Sequence[tuple[Path, str]]) -> list[str]:
    """Return the shortest unique labels of (path, preset): run or preset, both, or the path and the preset."""
    places, presets = [_place(path) for path, _ in contenders], [preset for _, preset in contenders]
    single = presets if len(set(places)) == 1 else [place.name for place in places]
    joint = [f"{place.name}/{preset}" for place, preset in zip(places, presets, strict=True)]
    for names in (single, joint):
        if len(set(names)) == len(names):
            return names
    return [f"{place}/{preset}" for place, preset in zip(places, presets, strict=True)]


def _contender(atlas: Atlas, preset: str, label: str) -> Contender:
    renderings = {layer.name: layer.render_attributes(preset) for layer in atlas if preset in layer.presets}
    objectives = {
        name: (str(rendering.get("objective", "")), str(rendering.get("natural", "")))
        for name, rendering in renderings.items()
    }
    counts = Counter(objective for objective, _ in objectives.values() if objective)
    return Contender(
        label=label,
        run=_place(atlas.path).name,
        preset=preset,
        path=atlas.path,
        objective=" and ".join(objective for objective, _ in counts.most_common()),
        # `energy` and `rectified`, the objectives of first and depthwise convolutions, have no such statistic.
        reference=next((natural for _, natural in objectives.values() if natural), ""),
        created=str(atlas.attributes.get("created", "")),
        settings=_settings(atlas.config, preset),
        layer_objectives=objectives,
    )


def _settings(config: str, preset: str) -> dict[str, str]:
    """Return the settings of one preset and the run's seed; empty if the YAML does not contain them."""
    tree = stored_settings(config)
    also = tree.get("also")
    sections = [tree.get("render"), *(also.values() if isinstance(also, Mapping) else ())]
    presets = [section for section in sections if isinstance(section, Mapping)]
    default = presets[0] if len(presets) == 1 else {}
    section = next((section for section in presets if section.get("name") == preset), default)
    settings = dict(_flat(section, ""))
    settings.pop("name", None)
    run = tree.get("run")
    if isinstance(run, Mapping) and "seed" in run:
        settings["seed"] = str(run["seed"])
    return settings


def _flat(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested mappings as (dotted key, text)."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list):
        yield prefix, yaml.safe_dump(node, default_flow_style=True, width=10**6).strip()
    else:
        yield prefix, "" if node is None or node == {} else str(node)


def differing_settings(contenders: Sequence[Contender]) -> list[tuple[str, list[str]]]:
    """Return (setting, value of each contender) for all settings in which the contenders differ."""
    keys = dict.fromkeys(key for contender in contenders for key in contender.settings)
    rows = [(key, [contender.settings.get(key, "") for contender in contenders]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
