"""What is typed after `atlas VERB` as overrides for Hydra, and Hydra's refusals in words."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from pipeline.errors import nearest

# Verbs that read a run which is there already, and take its folder.
ON_FOLDER = ("site", "serve", "publish", "status", "verify", "repair", "compact", "export")


@dataclasses.dataclass(frozen=True)
class Compare:
    """What `compare` is asked: runs by name or folder, the presets that count (all, if none), and where to."""

    runs: tuple[str, ...]
    presets: tuple[str, ...]
    out: str | None


def conf_folder() -> Path:
    """The folder of YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def named(verb: str, arguments: Sequence[str]) -> list[str]:
    """Arguments as Hydra's overrides: a run's folder given by position, and presets in `also=[…]`."""
    found = []
    if verb == "publish":
        _, arguments = target(arguments)
    if verb == "compare":
        _, arguments = compared(arguments)
    for argument in arguments:
        if argument.startswith("also="):
            names = argument.removeprefix("also=").strip("[]").split(",")
            found += [f"+render@also.{name.strip()}={name.strip()}" for name in names if name.strip()]
        elif verb not in ON_FOLDER or argument.startswith("-") or "=" in argument or argument.startswith("~"):
            found.append(argument)
        else:
            path = Path(argument)
            found += [f"run.root='{path.parent if path.parent != Path() else 'runs'}'", f"run.name='{path.name}'"]
    return found


def target(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Where `publish` goes, its first plain word, and the arguments without it."""
    plain = [a for a in arguments if not a.startswith(("-", "~")) and "=" not in a]
    rest = list(arguments)
    if plain:
        rest.remove(plain[0])
    return plain[0] if plain else "", rest


def compared(arguments: Sequence[str]) -> tuple[Compare, list[str]]:
    """What is compared: `runs=[a,b]` (or plain words), `presets=[…]` and `out=…`; and the arguments without them."""
    rest, found = [], {"runs": [], "presets": []}
    out = None
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in found and equals:
            found[key] += [name.strip().strip("'\"") for name in value.strip("[]").split(",") if name.strip()]
        elif key == "out" and equals:
            out = value
        elif equals or argument.startswith(("-", "~")):
            rest.append(argument)
        else:
            found["runs"].append(argument)
    return Compare(tuple(found["runs"]), tuple(found["presets"]), out), rest


def explain(error: Exception) -> str:
    """A composition error in few words, with the nearest valid names."""
    message = str(error).strip()
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"There is no {group}={name}. {nearest(name, error.options, 6)}"
    match = re.search(r"Could not (?:override|delete|load) '?([\w./@]+)'?", message)
    if match:
        return f"{match[1]} is not a setting. {nearest(match[1], settings())}"
    cause = f"\n{error.__cause__}" if error.__cause__ is not None else ""
    return f"{message}{cause}"


def settings() -> Iterator[str]:
    """All keys of the default configuration, and all groups."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        tree: Any = OmegaConf.to_container(hydra.compose("config"), resolve=False)

    def keys(node: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for key, value in node.items():
            yield prefix + key
            if isinstance(value, Mapping):
                yield from keys(value, f"{prefix}{key}.")

    return keys(tree, "")
