"""The base run of a run (`base=`): its folder, and whether its results can be reused."""

import dataclasses
from pathlib import Path
from typing import Any

from pipeline.config.schema import Config, differences, from_tree
from pipeline.core import plugins
from pipeline.core.config_files import is_url
from pipeline.core.errors import AtlasError
from pipeline.core.registry import canonical
from pipeline.models.loading import Model
from pipeline.planning import manifest
from pipeline.planning.folder import RunFolder
from pipeline.planning.manifest import Manifest
from pipeline.store.reader import open_atlas
from pipeline.store.remote import local_root, split_url


def find_base_run(config: Config) -> RunFolder | None:
    """Return the folder of the base run; None if there is none, or if `base` names the run itself.

    Raises:
        AtlasError: If `base` names no run, or if `only` would select units of the run itself.
    """
    if config.base is None:
        return None
    path = _base_folder(config).path
    if path.resolve() == config.folder.resolve():
        if config.only is not None:
            raise AtlasError(
                f"only={config.only} and base={config.base} name this run itself, which would lose units with every "
                "call. Give the new run another name: run.name=…"
            )
        return None
    try:
        return RunFolder(path).existing()
    except AtlasError as error:
        raise AtlasError(f"base={config.base}: {error}") from None


def fetch_base_run(config: Config) -> None:
    """Fetch the base run if it is in an object store, for `find_base_run`.

    Raises:
        AtlasError: If `base` names no run.
        TryAgainError: If the store can't be read.
    """
    if config.base is not None and is_url(config.base) and config.base.rstrip("/") != config.url:
        _base_folder(config).existing("shards", "atlas.h5")


def _base_folder(config: Config) -> RunFolder:
    base = config.base or ""
    if not is_url(base):
        return RunFolder(Path(base).expanduser())
    root, name = split_url(base)
    return RunFolder(local_root(root, config.run.scratch) / name, base)


def check_same_sources(base: RunFolder, config: Config, model: Model, fingerprint: str) -> None:
    """Check that a base run has the same weights, dataset images and preprocessing as this run.

    Args:
        base: Folder of the base run.
        config: The configuration of this run.
        model: The network of this run.
        fingerprint: Digest of the dataset of this run and its preprocessing.

    Raises:
        AtlasError: If they differ; the message lists the differences.
    """
    base_manifest = manifest.read(base.path)
    weights, dataset = _digests(base, base_manifest, config)
    base_config = read_config(base)
    different = _network_differences(base_config, config, model, weights)
    preprocessing: dict[str, Any] = dataclasses.asdict(model.preprocessing)
    base_preprocessing = dataclasses.asdict(base_manifest.recipe) if base_manifest else preprocessing
    different += differences(base_preprocessing, preprocessing, "input recipe, ")
    if dataset and dataset != fingerprint and base_preprocessing == preprocessing:
        data: list[str] = []
        if base_config:
            data = differences(canonical(base_config.data), canonical(config.data), "data.")
        different += data or ["the dataset images: the settings are the same, but files were added, removed or changed"]
    if different:
        listed = "\n  ".join(dict.fromkeys(different))
        raise AtlasError(
            f"Nothing of base={config.base} can be reused, because this run differs from it:\n  {listed}\n"
            "Give this run the settings on the left, or leave base out to compute everything again."
        )


def _digests(base: RunFolder, base_manifest: Manifest | None, config: Config) -> tuple[str, str]:
    """Return the digests of weights and dataset of a base run, from its manifest or else its atlas.h5."""
    if base_manifest is not None:
        return base_manifest.weights, base_manifest.dataset
    if base.atlas.is_file():
        with open_atlas(base.atlas) as atlas:
            return str(atlas.attributes["weights_sha256"]), str(atlas.attributes["dataset_fingerprint"])
    raise AtlasError(
        f"base={config.base} has no record of its weights and dataset: `atlas plan` with its settings writes one."
    )


def _network_differences(base_config: Config | None, config: Config, model: Model, base_weights: str) -> list[str]:
    """Return the settings that build another network; the digests of the weights if no setting differs."""
    tree: dict[str, Any] = canonical(config.model)
    base_tree: dict[str, Any] = canonical(base_config.model) if base_config else {}
    for section in (tree, base_tree):
        for key in ("folder", "labels", "aliases"):
            section.pop(key, None)
    changed = differences(base_tree, tree, "model.") if base_config else []
    if base_weights != model.digest:
        return changed or [f"the weights of {model.name}: {base_weights[:12]} → {model.digest[:12]}"]
    if base_config and base_tree["arguments"] != tree["arguments"]:
        return [line for line in changed if line.startswith("model.arguments")]
    return []


def read_config(base: RunFolder) -> Config | None:
    """Return the configuration of a run; None if this version can't parse it."""
    try:
        with plugins.forbidden():
            return from_tree(base.read_config())
    except (AtlasError, TypeError, KeyError):
        return None
