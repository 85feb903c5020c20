"""Device and precision of a run: a run folder keeps those that its first visualizations were made with.

Both change pixels and are part of the digest of visualizations. `auto` therefore means the device and the precision
that the results of the folder (or else of the base run) have, and the fastest of this machine for a new run.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.acceleration.precision import capability_of, precision_of
from pipeline.config.schema import EngineConfig
from pipeline.core.errors import AtlasError
from pipeline.engine.tasks import Setup, device_kind
from pipeline.planning.folder import RunFolder
from pipeline.store import shards, writer

log = logging.getLogger(__name__)


def recorded(folder: RunFolder) -> dict[str, str]:
    """Return device and requested precision of the latest visualizations of a run; empty if there are none."""
    found: Mapping[str, Any] = {}
    for path in sorted((folder.shards / "render").rglob("*.h5"), key=_modified, reverse=True):
        shard = shards.read(path)
        if shard is not None:
            found = shard.attributes
            break
    else:
        parts = writer.render_groups(folder.atlas)
        if parts:
            found = next(iter(parts.values())).attributes
    names = {"device": "device", "requested_precision": "precision"}
    return {names[key]: str(value) for key, value in found.items() if key in names}


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def resolved(config: EngineConfig, folder: RunFolder, base: RunFolder | None) -> EngineConfig:
    """Return the engine's settings with what the results of the run or of its base imply for `auto`.

    The precision of results from another kind of device implies nothing: all visualizations are made again.

    Raises:
        AtlasError: If the run began on a GPU and this machine has none.
    """
    own = recorded(folder)
    before = own or (recorded(base) if base is not None else {})
    chosen, here = config, "cuda" if torch.cuda.is_available() else "cpu"
    if config.precision == "auto" and "precision" in before:
        chosen = dataclasses.replace(config, precision=before["precision"])
    if "device" not in before:
        return chosen
    device = before["device"]
    if config.device != "auto":
        return chosen if device_kind(config.device) == device else config
    if device == "cuda" and here == "cpu" and config.address is None:
        if not own:
            return config
        raise AtlasError(
            f"{folder} has visualizations made on a GPU, and this machine has none: go on where there is one, or "
            "set engine.device=cpu, which makes all of them again here."
        )
    if device == "cpu" and here == "cuda":
        log.warning(
            "%s has visualizations made on CPUs and goes on there; engine.device=cuda makes all again on the GPU",
            folder.path if own else base and base.path,
        )
    return dataclasses.replace(chosen, device=device)


def for_verification(config: EngineConfig) -> EngineConfig:
    """Return the engine's settings to render visualizations again on this machine, wherever they were made."""
    if torch.cuda.is_available():
        return config
    return dataclasses.replace(config, device="cpu", precision="float32")


def precision_name(precision: str, device: str) -> str:
    """Return the precision of steps for a setting of `engine.precision` and a device.

    Raises:
        AtlasError: If the device does not have it.
    """
    return precision_of(precision, torch.device(device).type, capability_of(device))


def on_device(setup: Setup, device: str) -> Setup:
    """Return `setup` for workers on `device`, with the precision that its configuration implies there."""
    return dataclasses.replace(setup, device=device, precision=precision_name(setup.config.engine.precision, device))
