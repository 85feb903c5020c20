"""The run that another one is based on: whether there is one, and whether the two are about the same thing."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.schema import Config, differences, from_tree
from pipeline.core.errors import AtlasError
from pipeline.core.registry import canonical
from pipeline.models.loading import Model
from pipeline.runs import manifest
from pipeline.runs.folder import RunFolder
from pipeline.store.reader import open_atlas


def based_on(config: Config) -> RunFolder | None:
    """The folder of the run that `base` names; None without, and where that is this very run.

    Raises `AtlasError` where there is no run, and where `only` asks a run about itself.
    """
    if config.base is None:
        return None
    path = Path(config.base).expanduser()
    if path.resolve() == config.folder.resolve():
        if config.only is not None:
            raise AtlasError(
                f"only={config.only} and base={config.base}: that is this very run, which would shrink each time it is "
                "asked. Give the new one a name of its own: run.name=…"
            )
        return None
    try:
        return RunFolder(path).existing()
    except AtlasError as error:
        raise AtlasError(f"base={config.base}: {error}") from None


def check(base: RunFolder, config: Config, model: Model, fingerprint: str) -> None:
    """Raise `AtlasError` unless `base` was made with these weights, photographs and this input recipe.

    `fingerprint` is the dataset's digest, of which the recipe is a part.
    """
    known = manifest.read(base.path)
    if known is not None:
        weights, dataset = known.weights, known.dataset
    elif base.atlas.is_file():
        with open_atlas(base.atlas) as atlas:
            weights, dataset = (str(atlas.attributes[key]) for key in ("weights_sha256", "dataset_fingerprint"))
    else:
        raise AtlasError(
            f"base={config.base} does not say what it was made from: `atlas plan` with its settings writes it down."
        )
    theirs = settings(base)
    model_there: dict[str, Any] = canonical(theirs.model) if theirs else {}
    model_here: dict[str, Any] = canonical(config.model)
    for found in (model_there, model_here):
        for key in ("folder", "labels", "aliases"):
            found.pop(key, None)
    built = [d for d in differences(model_there, model_here, "model.") if theirs]
    apart: list[str] = []
    if weights != model.digest:
        apart += built or [f"the weights of {model.name}: {weights[:12]} → {model.digest[:12]}"]
    elif theirs and model_there["arguments"] != model_here["arguments"]:
        apart += [d for d in built if d.startswith("model.arguments")]
    recipe_here: dict[str, Any] = dataclasses.asdict(model.recipe)
    recipe_there: dict[str, Any] = dataclasses.asdict(known.recipe) if known else recipe_here
    apart += differences(recipe_there, recipe_here, "input recipe, ")
    if dataset and dataset != fingerprint and recipe_there == recipe_here:
        data = differences(canonical(theirs.data), canonical(config.data), "data.") if theirs else []
        apart += data or ["the photographs: the same settings, but files were added, removed or changed"]
    if apart:
        listed = "\n  ".join(dict.fromkeys(apart))
        raise AtlasError(
            f"base={config.base} has nothing to lend, for this run is about something else:\n  {listed}\n"
            "Give this run the settings on the left, or leave base out: without it, all is made anew."
        )


def settings(base: RunFolder) -> Config | None:
    """The configuration of a run; None if it is not one that this program understands."""
    try:
        return from_tree(yaml.safe_load(base.config.read_text(encoding="utf-8")))
    except (AtlasError, OSError, yaml.YAMLError, TypeError, KeyError):
        return None
