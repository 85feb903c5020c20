"""What is typed after `atlas VERB` as overrides for Hydra, and Hydra's refusals in words."""

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf, grammar_parser
from omegaconf.errors import GrammarParseError

from pipeline.core.errors import nearest

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
    package = Path(__file__).resolve().parents[1]
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
        elif verb in ON_FOLDER and (_is_folder(argument) or not _is_override(argument)):
            path = Path(argument).expanduser()
            path = path if path.name not in ("", "..") else path.resolve()
            root = "runs" if path.parent == Path() and "/" not in argument else str(path.parent)
            found += [f"run.root={literal(root)}", f"run.name={literal(path.name)}"]
        else:
            found.append(argument)
    return found


def _is_override(argument: str) -> bool:
    return argument.startswith(("-", "~")) or "=" in argument


def _is_folder(argument: str) -> bool:
    """Whether an argument is the path of a folder that is there, be it called like an override: `runs/lr=3`."""
    return "/" in argument and not argument.startswith("-") and Path(argument).expanduser().is_dir()


def quoted(text: str) -> str:
    """A text in double quotes, as Hydra's grammar has them: backslashes count only before a quote and at the end."""
    escaped = re.sub(r'(\\*)"', lambda match: match[1] * 2 + '\\"', text)
    return '"' + re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped) + '"'


def literal(text: str) -> str:
    """A text in double quotes in which `${…}` refers to nothing either."""
    return quoted(re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text))


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
        elif _is_override(argument) and not _is_folder(argument):
            rest.append(argument)
        else:
            found["runs"].append(argument)
    return Compare(tuple(found["runs"]), tuple(found["presets"]), out), rest


def explain(error: Exception, overrides: Sequence[str] = ()) -> str:
    """A composition error in few words, with the nearest valid names, or with the quotes that an argument needs."""
    message = str(error).strip()
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"There is no {group}={name}. {nearest(name, error.options, 6)}"
    match = re.search(r"Could not (?:override|delete|load) '?([\w./@]+)'?", message)
    if match:
        return f"{match[1]} is not a setting. {nearest(match[1], settings())}"
    for override in overrides:
        if told := _unreadable(override, sweeps="--multirun" in overrides or "-m" in overrides):
            return told
    cause = f"\n{error.__cause__}" if error.__cause__ is not None else ""
    return f"{message}{cause}"


def _unreadable(override: str, sweeps: bool) -> str:
    """What is wrong with an argument that Hydra's grammar does not allow, and how to type it; empty if it does."""
    if override.startswith("-"):
        return ""
    key, equals, value = override.partition("=")
    several = False
    try:
        several = OverridesParser.create().parse_override(override).is_sweep_override()
        if sweeps or not several:
            return ""
    except Exception:  # the parser raises errors of several libraries
        if not re.fullmatch(r"[~+]{0,2}[\w./@:-]+", key):
            return f"{override!r}: {key!r} is not a setting. {nearest(key, settings())}"
        if not equals:
            return f"{override!r} has no value: write {shlex.quote(key)}=VALUE."
    if several:
        return (
            f"{override!r} gives several values. For one value with commas in it, type {_typed(key, quoted(value))}; "
            f"for a list, {_typed(key, f'[{value}]')}; for a run with each of them, add --multirun."
        )
    plain = " ,[]{}" if value.startswith(("[", "{")) else " "
    odd = sorted(set(re.sub(r"[\w/\\.+$%*@?|:-]", "", value, flags=re.ASCII)) - set(plain))
    because = f" because of {' '.join(odd)}" if odd else ""
    return f"{override!r} can't be read{because}: such a value needs quotes. Type {_typed(key, _mended(value))}."


def _typed(key: str, value: str) -> str:
    """An argument as it is typed in a shell."""
    return shlex.quote(f"{key}={value}")


def _mended(value: str) -> str:
    """A value with quotes around that of it which Hydra can't read: all, or some members of a list or mapping."""
    inner = value.strip()
    if _reads(inner):
        return inner
    whole = quoted(value) if _refers(value) else literal(value)
    if inner.startswith("[") and inner.endswith("]"):
        mended = f"[{','.join(_mended(member.strip()) for member in _members(inner[1:-1]))}]"
    elif inner.startswith("{") and inner.endswith("}"):
        entries = [member.partition(":") for member in _members(inner[1:-1])]
        mended = f"{{{','.join(f'{_mended(key.strip())}: {_mended(item.strip())}' for key, _, item in entries)}}}"
    else:
        return whole
    return mended if _reads(mended) else whole


def _refers(text: str) -> bool:
    """Whether every `${` in a text begins a reference."""
    try:
        grammar_parser.parse(text)
    except GrammarParseError:
        return False
    return True


def _reads(value: str) -> bool:
    try:
        return not OverridesParser.create().parse_override(f"key={value}").is_sweep_override()
    except Exception:  # the parser raises errors of several libraries
        return False


def _members(text: str) -> list[str]:
    """The parts of a list's or mapping's inside, between commas that are in no brackets or quotes."""
    members, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and not members[-1].strip():
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        elif character == "," and not depth:
            members.append("")
            continue
        members[-1] += character
    return members if text.strip() else []


def as_text(message: str, overrides: Sequence[str]) -> str:
    """How to type an argument whose value was taken for a number or the like, where a text is needed; or nothing.

    `message` is the error about a wrong type, which begins with the setting.
    """
    if "has the wrong type" not in message or not re.search(r"\bstr\b", message):
        return ""
    for override in overrides:
        key, _, value = override.partition("=")
        name = key.lstrip("+")
        if message.startswith(f"{name}="):
            return f"For a text, type {_typed(key, quoted(value))}."
        if message.startswith(f"{name}[") and value.startswith("["):
            members = [member.strip() for member in _members(value[1:-1])]
            listed = ",".join(m if m.startswith(("'", '"')) else quoted(m) for m in members)
            return f"For texts, type {_typed(key, f'[{listed}]')}."
    return ""


def reference(error: Exception, overrides: Sequence[str]) -> str:
    """What is wrong with a `${…}` that refers to nothing, and how to type it where it is no reference."""
    for override in overrides:
        key, _, value = override.partition("=")
        if "${" in value:
            bare = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value
            return (
                f"{override!r}: {str(error).splitlines()[0]}. `${{…}}` stands for the value of another setting; where "
                f"it is part of a text, type {_typed(key, literal(bare))}."
            )
    return str(error)


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
