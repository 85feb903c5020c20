"""What is compared: the pictures of a run by one preset; found, opened, and held against each other beforehand."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.errors import AtlasError, nearest
from pipeline.store.reader import Atlas, open_atlas

# What must be the same for numbers of two runs to mean the same, and how a person calls it.
SHARED = {"model": "model", "weights_sha256": "weights", "dataset_fingerprint": "photographs"}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One side of a comparison. `label` is unlike all others'; `settings` are those of its preset, by dotted key.

    `natural` is what of photographs its activation is held against (`LayerView.render_attributes`), with `negative`
    where both are as low as can be.
    """

    label: str
    run: str
    preset: str
    path: Path
    objective: str
    natural: str
    created: str
    settings: Mapping[str, str]

    @property
    def negative(self) -> bool:
        """Whether its pictures were made to lower the unit."""
        return self.natural in ("least", "min")


@dataclasses.dataclass(frozen=True)
class RunComparison:
    """All contenders, each with the open atlas that it is in; contenders of one run share it."""

    contenders: tuple[Contender, ...]
    atlases: tuple[Atlas, ...]

    @property
    def first(self) -> Atlas:
        """The atlas that tells what all have in common."""
        return self.atlases[0]


def find(name: str, root: Path) -> Path:
    """The `atlas.h5` of a run, given as a name below `root`, as its folder, or as the file.

    Raises `AtlasError` with the nearest runs where there is none.
    """
    for place in (root / name, Path(name)):
        if place.is_file() or (place / "atlas.h5").is_file():
            return place if place.is_file() else place / "atlas.h5"
        if (place / "config.yaml").is_file():
            raise AtlasError(f"{place} is a run without an atlas.h5 so far; `atlas run` finishes it.")
    folder = Path(name).parent if Path(name).parent != Path() else root
    runs = sorted(p.parent.name for p in folder.glob("*/atlas.h5"))
    raise AtlasError(f"There is no run {name!r} in {folder}. {nearest(Path(name).name, runs)}")


@contextlib.contextmanager
def opened(runs: Sequence[str], presets: Sequence[str] = (), root: Path = Path("runs")) -> Iterator[RunComparison]:
    """Open what is to be compared: each of `runs` by each of `presets` that it has (all, if none is named).

    Raises `AtlasError` for a run that is not there, a preset that none of them has, runs of another model, other
    weights or other photographs, and for fewer than two contenders.
    """
    paths = list(dict.fromkeys(find(name, root).resolve() for name in runs))
    with contextlib.ExitStack() as stack:
        atlases = [stack.enter_context(open_atlas(path)) for path in paths]
        for atlas in atlases[1:]:
            _check(atlases[0], atlas)
        have = [_presets(atlas) for atlas in atlases]
        every = list(dict.fromkeys(preset for found in have for preset in found))
        for preset in presets:
            if preset not in every:
                raise AtlasError(f"No run here has pictures by {preset!r}. {nearest(preset, every)}")
        chosen = [(a, p) for a, found in zip(atlases, have, strict=True) for p in presets or found if p in found]
        if len(chosen) < 2:
            what = f"only {_place(chosen[0][0].path)} by {chosen[0][1]}" if chosen else "nothing"
            raise AtlasError(
                f"A comparison needs two runs, or one run with two presets; there is {what}. "
                "`atlas compare runs=[one,other]`."
            )
        labels = _labels([(atlas.path, preset) for atlas, preset in chosen])
        found = [_contender(a, p, label) for (a, p), label in zip(chosen, labels, strict=True)]
        yield RunComparison(tuple(found), tuple(atlas for atlas, _ in chosen))


def _check(one: Atlas, other: Atlas) -> None:
    """Refuse two atlases that don't show the same network beside the same photographs."""
    left, right = one.attributes, other.attributes
    wrong = [
        f"{word} ({key}): {_short(left.get(key))} and {_short(right.get(key))}"
        for key, word in SHARED.items()
        if left.get(key) != right.get(key)
    ]
    if wrong:
        raise AtlasError(
            f"{_place(one.path)} and {_place(other.path)} can't be compared, for they differ in\n  "
            + "\n  ".join(wrong)
        )


def _short(value: Any) -> str:
    """A digest is told by its beginning."""
    return "none" if value is None else str(value)[:16] or "none"


def _place(path: Path) -> Path:
    """The run's folder, or the file where it is called something else."""
    return path.parent if path.name == "atlas.h5" else path


def _presets(atlas: Atlas) -> list[str]:
    return list(dict.fromkeys(preset for layer in atlas for preset in layer.presets))


def _labels(found: Sequence[tuple[Path, str]]) -> list[str]:
    """The shortest names that tell all contenders apart: the run's, the preset's, both, or the whole path with it."""
    places, presets = [_place(path) for path, _ in found], [preset for _, preset in found]
    alone = presets if len(set(places)) == 1 else [place.name for place in places]
    joint = [f"{place.name}/{preset}" for place, preset in zip(places, presets, strict=True)]
    for names in (alone, joint):
        if len(set(names)) == len(names):
            return names
    return [f"{place}/{preset}" for place, preset in zip(places, presets, strict=True)]


def _contender(atlas: Atlas, preset: str, label: str) -> Contender:
    layer = next(layer for layer in atlas if preset in layer.presets)
    told, attributes = layer.render_attributes(preset), atlas.attributes
    return Contender(
        label=label,
        run=_place(atlas.path).name,
        preset=preset,
        path=atlas.path,
        objective=str(told.get("objective", "")),
        natural=str(told.get("natural", "")),
        created=str(attributes.get("created", "")),
        settings=_settings(atlas.config, preset),
    )


def _settings(config: str, preset: str) -> dict[str, str]:
    """Settings of one preset of a configuration, and the run's seed; empty where the YAML doesn't say."""
    try:
        tree = yaml.safe_load(config)
    except yaml.YAMLError:
        return {}
    if not isinstance(tree, Mapping):
        return {}
    also = tree.get("also")
    sections = [tree.get("render"), *(also.values() if isinstance(also, Mapping) else ())]
    named = [s for s in sections if isinstance(s, Mapping)]
    section = next((s for s in named if s.get("name") == preset), named[0] if len(named) == 1 else {})
    found = dict(_flat(section, ""))
    found.pop("name", None)
    run = tree.get("run")
    if isinstance(run, Mapping) and "seed" in run:
        found["seed"] = str(run["seed"])
    return found


def _flat(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Leaves of nested mappings as (dotted key, text)."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list):
        yield prefix, yaml.safe_dump(node, default_flow_style=True, width=10**6).strip()
    else:
        yield prefix, "" if node is None or node == {} else str(node)


def unlike(contenders: Sequence[Contender]) -> list[tuple[str, list[str]]]:
    """(setting, its value for each contender) of every setting in which they are not all alike."""
    keys = dict.fromkeys(key for contender in contenders for key in contender.settings)
    rows = [(key, [contender.settings.get(key, "") for contender in contenders]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]
