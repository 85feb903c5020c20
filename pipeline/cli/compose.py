"""Composition of a configuration from overrides, in this process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.cli.overrides import composed, explain, to_overrides
from pipeline.config.schema import from_tree
from pipeline.core.errors import AtlasError
from pipeline.planning.request import Request
from pipeline.store.shards import safe_name


def compose(overrides: Sequence[str]) -> Request:
    """Return the request of overrides as they are typed on the command line.

    Raises:
        AtlasError: If an override is wrong.
    """
    plain = to_overrides(overrides)
    try:
        return request_of(composed(plain))
    except (HydraException, OmegaConfBaseException) as error:
        raise AtlasError(explain(error, plain)) from error


def request_of(composed: DictConfig) -> Request:
    """Return the request of a composed configuration; a run without a name is named after network and preset.

    Raises:
        AtlasError: If a setting is wrong.
    """
    tree: Any = OmegaConf.to_container(composed, resolve=True)
    tree.pop("hydra", None)
    tree.pop("experiment", None)
    for optional in ("also", "judges"):
        if not tree.get(optional):
            tree.pop(optional, None)
    if not (tree.get("display") or {}).get("units"):
        tree.pop("display", None)
    judges = tree.get("judges")
    for network in (tree.get("model"), *(judges.values() if isinstance(judges, dict) else ())):
        _name_custom(network)
    section = tree.get("run")
    if isinstance(section, dict) and section.get("name") is None:
        section["name"] = safe_name(f"{tree['model'].get('name')}-{tree['render'].get('name')}")
    config = from_tree(tree)
    # Not with OmegaConf, for which `${` in a path is a reference.
    return Request(config, tree, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def _name_custom(network: Any) -> None:
    """Name a custom network without a name after the file of its code."""
    if isinstance(network, dict) and network.get("name") is None and "target" in network:
        place = str(network["target"] or "custom").partition(":")[0]
        network["name"] = safe_name(Path(place).name.removesuffix(".py").removesuffix(".pt2"))
