"""Arguments of the command line as overrides for Hydra, and the errors of Hydra with their fix."""

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
from omegaconf import DictConfig, OmegaConf, grammar_parser
from omegaconf.errors import GrammarParseError

from pipeline.cli import member_defaults
from pipeline.core.config_files import is_url
from pipeline.core.errors import nearest_names
from pipeline.store.remote import split_url
from pipeline.visualization.preset import KEYED_GROUPS

member_defaults.register()


@dataclasses.dataclass(frozen=True)
class CompareArguments:
    """Arguments of `atlas compare`.

    Attributes:
        runs: Names or folders of the runs.
        presets: Presets that are compared; all if empty.
        out: Folder of the results; None for the default.
    """

    runs: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    out: str | None = None


@dataclasses.dataclass(frozen=True)
class Options:
    """Arguments of a verb that are no settings of the configuration.

    Attributes:
        values: Options that were written as key=value.
        flags: Options that were written as --flag.
        host: Host of `atlas publish`; empty if none was named.
        compare: Arguments of `atlas compare`.
    """

    values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    flags: frozenset[str] = frozenset()
    host: str = ""
    compare: CompareArguments = CompareArguments()


def conf_folder() -> Path:
    """Return the folder of YAML files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def split_options(
    verb: str, arguments: Sequence[str], keys: Sequence[str] = (), flags: Sequence[str] = ()
) -> tuple[Options, list[str]]:
    """Split the arguments of a verb into its own options and the rest.

    Args:
        verb: The verb.
        arguments: Everything after the verb.
        keys: Options of the verb that are written as key=value.
        flags: Options of the verb that are written as --flag.
    """
    host, compare = "", CompareArguments()
    rest = list(arguments)
    if verb == "publish":
        host, rest = split_host(rest)
    if verb == "compare":
        compare, rest = split_compare(rest)
    values = {key: value for key, equals, value in (a.partition("=") for a in rest) if equals and key in keys}
    chosen = frozenset(flag for flag in flags if f"--{flag}" in rest)
    rest = [a for a in rest if a.partition("=")[0] not in values and a.removeprefix("--") not in chosen]
    return Options(values, chosen, host, compare), rest


# Lists of choices of a group, each of which becomes a section of its own.
_LISTS = {"also": "render", "judges": "model"}

# A list of members in place of the members of a group: render.penalties=[my_file.py:Class].
_MEMBERS = re.compile(rf"(render|also\.[\w-]+)\.({'|'.join(KEYED_GROUPS)})=\[")


def _added_members(argument: str) -> list[str]:
    """Return overrides that add the listed members to those of the preset, each under a key of its own.

    Hydra cannot merge a list into the mapping of a preset. The key is the name of the class or of the member.
    """
    group, _, value = argument.partition("=")
    try:
        items = OverridesParser.create().parse_override(f"members={value}").value()
    except Exception:  # the parser raises errors of several libraries; Hydra reports them again
        return [argument]
    overrides = []
    for item in items if isinstance(items, list) else ():
        settings = dict(item) if isinstance(item, Mapping) else {"name": item}
        name = str(settings.get("name", ""))
        key = re.sub(r"\W", "_", name.rpartition(":")[2])
        if not key:
            return [argument]
        overrides.append(f"++{group}.{key}={_as_override(settings)}")
    return overrides


def _as_override(value: Any) -> str:
    """Return a parsed value in the grammar of Hydra."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}: {_as_override(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_as_override, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if isinstance(value, int | float) else literal(str(value))


def to_overrides(arguments: Sequence[str], on_folder: bool = False) -> list[str]:
    """Return arguments as overrides for Hydra: `also=[…]` and `judges=[…]`, and the folder of a run.

    Args:
        arguments: Arguments without the verb and its options.
        on_folder: Whether an argument may be the folder of a run.
    """
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in _LISTS:
            names = [name.strip().strip("'\"") for name in value.strip("[]").split(",")]
            overrides += [f"+{_LISTS[key]}@{key}.{name}={name}" for name in names if name]
        elif on_folder and is_url(argument):
            root, name = split_url(argument)
            overrides += [f"run.root={literal(root)}", f"run.name={literal(name)}"]
        elif on_folder and (_is_folder(argument) or not _is_override(argument)):
            path = Path(argument).expanduser()
            path = path if path.name not in ("", "..") else path.resolve()
            root = "runs" if path.parent == Path() and "/" not in argument else str(path.parent)
            overrides += [f"run.root={literal(root)}", f"run.name={literal(path.name)}"]
        elif _MEMBERS.match(argument):
            overrides += _added_members(argument)
        else:
            overrides.append(argument)
    return overrides


def settable(override: str) -> str:
    """Return an override with `++` for `+` if it is a setting of a preset.

    Settings that a preset's YAML files leave out are present with their defaults, and `+` alone would refuse them.
    """
    return f"+{override}" if re.match(r"\+(render|also)\.[\w.]+=", override) else override


def composed(overrides: Sequence[str]) -> DictConfig:
    """Return the configuration that Hydra composes from overrides.

    Raises:
        HydraException: If an override is wrong.
    """
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return hydra.compose("config", overrides=[settable(override) for override in overrides])


def _is_override(argument: str) -> bool:
    return argument.startswith(("-", "~")) or "=" in argument


def _is_folder(argument: str) -> bool:
    """Return whether an argument is the path of an existing folder, even if it looks like an override: `runs/lr=3`."""
    return "/" in argument and not argument.startswith("-") and Path(argument).expanduser().is_dir()


def quoted(text: str) -> str:
    """Return a text in double quotes for Hydra: backslashes escape only before a quote and at the end."""
    escaped = re.sub(r'(\\*)"', lambda match: match[1] * 2 + '\\"', text)
    return '"' + re.sub(r"(\\+)$", lambda match: match[1] * 2, escaped) + '"'


def literal(text: str) -> str:
    """Return a text in double quotes in which `${…}` is no reference."""
    return quoted(re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text))


def split_host(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the host of `atlas publish`, its first plain word, and the other arguments."""
    plain = [a for a in arguments if not a.startswith(("-", "~")) and "=" not in a]
    rest = list(arguments)
    if plain:
        rest.remove(plain[0])
    return plain[0] if plain else "", rest


def split_compare(arguments: Sequence[str]) -> tuple[CompareArguments, list[str]]:
    """Return `runs=[a,b]` (or plain words), `presets=[…]` and `out=…` of `atlas compare`, and the other arguments."""
    lists: dict[str, list[str]] = {"runs": [], "presets": []}
    rest, out = [], None
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in lists and equals:
            lists[key] += [name.strip().strip("'\"") for name in value.strip("[]").split(",") if name.strip()]
        elif key == "out" and equals:
            out = value
        elif _is_override(argument) and not _is_folder(argument):
            rest.append(argument)
        else:
            lists["runs"].append(argument)
    return CompareArguments(tuple(lists["runs"]), tuple(lists["presets"]), out), rest


def explain(error: Exception, overrides: Sequence[str] = ()) -> str:
    """Return a message for a composition error, with the nearest valid names or the quotes that an argument needs."""
    message = str(error).strip()
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if f"+{group}@judges.{name}={name}" in overrides:
            return f"judges: there is no network {name!r}. {nearest_names(name, error.options, 6)}"
        return f"There is no {group}={name}. {nearest_names(name, error.options, 6)}"
    match = re.search(r"Could not (?:override|delete|load) '?([\w./@]+)'?", message)
    if match:
        return f"{match[1]} is not a setting. {nearest_names(match[1], settings())}"
    for override in overrides:
        problem = _unreadable(override, sweeps="--multirun" in overrides or "-m" in overrides)
        if problem:
            return problem
    cause = f"\n{error.__cause__}" if error.__cause__ is not None else ""
    return f"{message}{cause}"


def _unreadable(override: str, sweeps: bool) -> str:
    """Return why the grammar of Hydra does not allow an argument, and how to type it; empty if it is allowed."""
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
            return f"{override!r}: {key!r} is not a setting. {nearest_names(key, settings())}"
        if not equals:
            return f"{override!r} has no value: write {shlex.quote(key)}=VALUE."
    if several:
        return (
            f"{override!r} gives several values. For one value with commas in it, type {_typed(key, quoted(value))}; "
            f"for a list, {_typed(key, f'[{value}]')}; for a run with each of them, add --multirun."
        )
    plain = " ,[]{}" if value.startswith(("[", "{")) else " "
    special = sorted(set(re.sub(r"[\w/\\.+$%*@?|:-]", "", value, flags=re.ASCII)) - set(plain))
    because = f" because of {' '.join(special)}" if special else ""
    return f"{override!r} can't be read{because}: such a value needs quotes. Type {_typed(key, _mended(value))}."


def _typed(key: str, value: str) -> str:
    """Return an argument as it is typed in a shell."""
    return shlex.quote(f"{key}={value}")


def _mended(value: str) -> str:
    """Return a value with quotes where Hydra needs them: around all of it, or around members of a list or mapping."""
    inner = value.strip()
    if _reads(inner):
        return inner
    all_quoted = quoted(value) if _refers(value) else literal(value)
    if inner.startswith("[") and inner.endswith("]"):
        mended = f"[{','.join(_mended(member.strip()) for member in _members(inner[1:-1]))}]"
    elif inner.startswith("{") and inner.endswith("}"):
        entries = [member.partition(":") for member in _members(inner[1:-1])]
        mended = f"{{{','.join(f'{_mended(key.strip())}: {_mended(item.strip())}' for key, _, item in entries)}}}"
    else:
        return all_quoted
    return mended if _reads(mended) else all_quoted


def _refers(text: str) -> bool:
    """Return whether every `${` in a text begins a reference."""
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
    """Split the inside of a list or mapping at commas outside of brackets and quotes."""
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
    """Return how to type a text that was read as a number or the like; empty if this is not the problem.

    Args:
        message: The error about a wrong type, which begins with the setting.
        overrides: The overrides of the command.
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
    """Return a message for a `${…}` that refers to nothing, with how to type it if it is meant as text."""
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
    """Return all keys of the default configuration, and all groups."""
    tree: Any = OmegaConf.to_container(composed([]), resolve=False)

    def keys(node: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for key, value in node.items():
            yield prefix + key
            if isinstance(value, Mapping):
                yield from keys(value, f"{prefix}{key}.")

    return keys(tree, "")
