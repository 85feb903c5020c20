"""Read a checkpoint, safely, and fit it to a network, or say exactly why it does not fit.

A checkpoint is searched for the network: every nested mapping and every prefix of names is a place where its state
dict may begin. The place under which most of the network's names are found with the right shapes is taken.
"""

import dataclasses
import functools
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.core.errors import AtlasError, first_line
from pipeline.models.state_dicts import Contents, Entry, Place, bare_name, contents, of_optimizer

log = logging.getLogger(__name__)

# Keys under which training scripts keep the state dict; of places with the same values, the first is reported.
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema",
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights", "module",
)  # fmt: skip

# Buffers that do not change what a network computes in eval mode; old files lack them.
COUNTER = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The settings `model.checkpoint_key` and `model.checkpoint_prefix`; null leaves the search free."""

    key: str | None = None
    prefix: str | None = None


@dataclasses.dataclass
class Candidate:
    """A place with what of the network is found there, by the network's own names.

    `stem` is what all names of the network begin with and those of the file do not. `rank` is what candidates are
    sorted by; those with the same first three values are rivals.
    """

    place: Place
    stem: str = ""
    found: dict[str, Entry] = dataclasses.field(default_factory=dict)
    exact: set[str] = dataclasses.field(default_factory=set)
    rank: tuple[Any, ...] = ()

    def fits(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors with the right shapes."""
        return {name: entry.value for name, entry in self.found.items() if _same_shape(own[name], entry.value)}

    def same(self, other: "Candidate") -> bool:
        """Whether both give the network the same values."""
        names = [{name for name in c.found if not name.endswith(COUNTER)} for c in (self, other)]
        return names[0] == names[1] and all(_equal(self.found[n].value, other.found[n].value) for n in names[0])


def load_checkpoint(
    module: nn.Module,
    path: Path,
    trust: bool = False,
    strict: bool = True,
    choice: Choice | None = None,
    content: bytes | None = None,
) -> None:
    """Fill `module` from a checkpoint: its state dict may lie in nested mappings, and its names may have a prefix.

    Weights only unless `trust`. Raises `AtlasError` where the file can't be read, where several networks in it fit,
    or where its tensors are not the network's, counted and sampled; with `strict=False` what fits is loaded and the
    rest is logged. Tensors of the file that belong to other modules than the network's are left out and logged.
    `content` is the file's, where it was read before.
    """
    choice = choice or Choice()
    loaded = contents(path, trust, content)
    inside = _within_key(loaded.entries, choice, path)
    own = module.state_dict()
    ranked = _ranked(inside, own, choice, path)
    best = ranked[0] if ranked else Candidate(Place((), ""))
    extras, left = _rest(loaded.entries if ranked else inside, best)
    fits = best.fits(own)
    missing, unexpected = _fill(module, fits, extras, _versions(loaded, module, best))
    wrong = {name: entry.value for name, entry in best.found.items() if name not in fits}
    missing = sorted(set(missing) - set(wrong))
    if not missing and not wrong:
        # A criterion or a second network beside the network is no fault; more layers or weights inside of it are.
        known = _first_parts(module, own, best.stem)
        unexpected = [
            name for name in unexpected if _first(name.removeprefix(best.stem)) in known and not name.endswith(COUNTER)
        ]
    problems = _problems(missing, sorted(unexpected), wrong, own)
    if problems and (strict or not fits):
        hint = " model.strict=false loads the tensors that fit." if fits else " Not one tensor fits."
        where = f" ({best.place})" if fits and best.place != Place((), "") else ""
        raise AtlasError(f"{path}{where} does not fit this network: {'; '.join(problems)}.{hint}")
    rivals = [c for c in ranked[1:] if c.rank[:3] == best.rank[:3] and not c.same(best)]
    if rivals:
        raise _ambiguous(path, [best, *rivals])
    if problems:
        _say(logging.WARNING, f"{path} fits in part, {len(fits)} of {len(own)} tensors: {'; '.join(problems)}")
    refused = set(unexpected)
    _report(path, best, ranked, [*left, *(e for name, e in extras.items() if name not in refused)])


def _within_key(entries: list[Entry], choice: Choice, path: Path) -> list[Entry]:
    """The entries below `model.checkpoint_key`; all without one."""
    if not choice.key:
        return entries
    found = [e for e in entries if any(".".join(e.keys[:i]) == choice.key for i in range(1, len(e.keys) + 1))]
    if found:
        return found
    counts = Counter(".".join(e.keys[:i]) for e in entries for i in range(1, len(e.keys) + 1))
    if not counts:
        raise AtlasError(
            f"model.checkpoint_key={choice.key}: the tensors of {path} lie under no key. Leave it null; "
            "model.checkpoint_prefix chooses by what their names begin with."
        )
    raise AtlasError(f"model.checkpoint_key={choice.key}: {path} has no such key with tensors. {_listed(counts)}")


def _within_prefix(places: Iterable[Place], choice: Choice, path: Path) -> set[str]:
    """The prefixes that `model.checkpoint_prefix` allows: itself, or, if no name has it, but for inserted parts."""
    assert choice.prefix is not None
    wanted = choice.prefix if choice.prefix.endswith(".") or not choice.prefix else f"{choice.prefix}."
    counts = Counter(place.prefix for place in places)
    if wanted in counts:
        return {wanted}
    bare = bare_name(wanted.split("."))
    found = {prefix for prefix in counts if prefix and bare_name(prefix.split(".")) == bare}
    if not found:
        del counts[""]
        there = _listed(counts) if counts else "Its names have no prefix: leave it null."
        raise AtlasError(f"model.checkpoint_prefix={choice.prefix}: no name in {path} begins with it. {there}")
    return found


def _listed(counts: Mapping[str, int], most: int = 8) -> str:
    """Names with the number of their tensors, as the end of an error message."""
    names = sorted(counts, key=lambda name: (name.rstrip(".").count("."), name))
    shown = ", ".join(f"{name} ({counts[name]})" for name in names[:most])
    return f"It has, with their numbers of tensors: {shown}{', …' if len(names) > most else ''}."


def _ranked(entries: Sequence[Entry], own: Mapping[str, Any], choice: Choice, path: Path) -> list[Candidate]:
    """All places where tensors of the network are found, the best first."""
    if choice.prefix is None:
        allowed = None
    else:
        allowed = _within_prefix((place for e in entries for place, _ in e.places()), choice, path)
    names = _names(own)
    found: dict[tuple[Place, str], Candidate] = {}
    for entry in entries:
        if choice.key is None and of_optimizer(entry.keys):
            continue
        for place, parts in entry.places():
            if allowed is not None and place.prefix not in allowed:
                continue
            raw, bare = ".".join(parts), bare_name(parts)
            for stem, index in names.items():
                name = index.get(raw) or index.get(bare)
                if name is None:
                    continue
                candidate = found.setdefault((place, stem), Candidate(place, stem))
                exact = stem + raw == name
                if name not in candidate.found or (exact and name not in candidate.exact):
                    candidate.found[name] = entry
                if exact:
                    candidate.exact.add(name)
    for candidate in found.values():
        candidate.rank = _rank(candidate, own, choice)
    return sorted(found.values(), key=lambda candidate: candidate.rank)


def _rank(candidate: Candidate, own: Mapping[str, Any], choice: Choice) -> tuple[Any, ...]:
    """What candidates are sorted by, first by how much of the network is found with the right shapes."""
    place = candidate.place
    last = place.keys[-1] if place.keys else ""
    return (
        -sum(not name.endswith(COUNTER) for name in candidate.fits(own)),
        choice.key is not None and ".".join(place.keys) != choice.key,
        place.preference,
        -len(candidate.found),
        WRAPPERS.index(last) if last in WRAPPERS else len(WRAPPERS),
        len(place.keys),
        len(place.prefix),
        len(candidate.stem),
    )


def _names(own: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The network's names by what is left of them without each stem that all of them begin with.

    A builder that wraps a network gives it such a stem, which a checkpoint of the network inside lacks.
    """
    parts = [name.split(".") for name in own]
    stems = [""]
    for i in range(min(map(len, parts), default=1) - 1):
        if len({names[i] for names in parts}) > 1:
            break
        stems.append(f"{stems[-1]}{parts[0][i]}.")
    found = {}
    for stem in stems:
        rests = {name.removeprefix(stem): name for name in own}
        for rest, name in list(rests.items()):
            rests.setdefault(bare_name(rest.split(".")), name)
        found[stem] = rests
    return found


def _rest(entries: Iterable[Entry], best: Candidate) -> tuple[dict[str, Entry], list[Entry]]:
    """What else lies at the chosen place, by the names that it would have in the network, and what lies elsewhere."""
    taken = {id(entry) for entry in best.found.values()}
    extras, left = {}, []
    for entry in entries:
        if id(entry) in taken:
            continue
        parts = entry.within(best.place)
        name = best.stem + bare_name(parts or ())
        # A name that was found already is here once more, as in a wrapped copy of the same network.
        if parts is None or name in best.found or of_optimizer(entry.keys[len(best.place.keys) :]):
            left.append(entry)
        else:
            extras[name] = entry
    return extras, left


def _fill(
    module: nn.Module, fits: Mapping[str, Any], extras: Mapping[str, Entry], versions: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Load what fits; the names that are missing then, and those that are not the network's.

    PyTorch decides what is missing, for modules may rename and fill in what older files have otherwise.
    """
    own = module.state_dict()
    memory = {n: (t.data_ptr(), t.shape) for n, t in own.items() if isinstance(t, Tensor) and t.data_ptr()}
    # Where tensors of the network share memory, one of them is enough: safetensors keeps no more.
    filled = {memory[name] for name in fits if name in memory}

    def missing(names: Iterable[str]) -> list[str]:
        return [n for n in names if not n.endswith(COUNTER) and memory.get(n) not in filled]

    def attempt(names: Iterable[str]) -> tuple[list[str], list[str]]:
        state = _Versioned({**fits, **{name: extras[name].value for name in names}})
        state._metadata = {name: dict(version) for name, version in versions.items()}
        answer = module.load_state_dict(state, strict=False)
        return missing(answer.missing_keys), list(answer.unexpected_keys)

    if missing(set(own) - set(fits)) and extras:
        # What the network lacks under these names may be what a module of it makes the missing ones from.
        try:
            return attempt(name for name in extras if name not in own)
        except Exception as error:
            log.debug("not loaded with tensors that are not in the network: %s", first_line(error))
    try:
        return attempt(())[0], list(extras)
    except Exception as error:
        raise AtlasError(f"PyTorch can't load the checkpoint's tensors into the network: {error}") from error


class _Versioned(dict[str, Any]):
    """A state dict with the version numbers of its modules, where PyTorch looks for them."""

    _metadata: dict[str, Any]


def _versions(loaded: Contents, module: nn.Module, chosen: Candidate) -> dict[str, Any]:
    """The version numbers at the chosen place, by the names of the network's modules."""
    modules = {bare_name(name.split(".")): name for name, _ in module.named_modules(remove_duplicate=False)}
    found = {}
    place, depth = chosen.place, len(chosen.place.keys)
    for keys, versions in loaded.metadata.items():
        if keys[:depth] != place.keys:
            continue
        for name, version in versions.items():
            path = "".join(f"{part}." for part in (*keys[depth:], name) if part)
            if path.startswith(place.prefix) and isinstance(version, Mapping):
                own = modules.get(bare_name((chosen.stem + path.removeprefix(place.prefix))[:-1].split(".")))
                if own is not None:
                    found[own] = dict(version)
    return found


def _first(name: str) -> str:
    """The first part of a name; all numbers are one, for they count the members of one container."""
    part = name.partition(".")[0]
    return "0" if part.isdigit() else part


def _first_parts(module: nn.Module, own: Iterable[str], stem: str) -> set[str]:
    """What the names of the network's tensors and modules begin with, after `stem`."""
    children = (name for name, _ in module.named_modules() if name.startswith(stem) and name != stem)
    return {_first(name.removeprefix(stem)) for name in (*own, *children)}


def _problems(
    missing: Sequence[str], unexpected: Sequence[str], wrong: Mapping[str, Any], own: Mapping[str, Any]
) -> list[str]:
    """Each kind of misfit, counted and sampled."""
    shapes = [f"{k} {_shape(v)} for {_shape(own[k])}" for k, v in sorted(wrong.items())]
    problems = []
    for names, what in ((missing, "missing"), (unexpected, "not in the network"), (shapes, "of another shape")):
        if names:
            verb, noun = ("is", "tensor") if len(names) == 1 else ("are", "tensors")
            problems.append(f"{len(names)} {noun} {verb} {what}, e.g. {', '.join(names[:3])}")
    return problems


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _same_shape(own: Any, value: Any) -> bool:
    """Also one value for a scalar, which PyTorch loads from its oldest files."""
    if not isinstance(own, Tensor) or not isinstance(value, Tensor):
        return isinstance(own, Tensor) == isinstance(value, Tensor)
    return own.shape == value.shape or (own.dim() == 0 and value.shape == (1,))


def _equal(a: Any, b: Any) -> bool:
    if a is b or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    if a.dtype != b.dtype:
        a, b = a.double(), b.double()
    return a.shape == b.shape and torch.equal(a, b)


def _ambiguous(path: Path, candidates: Sequence[Candidate]) -> AtlasError:
    places = list(dict.fromkeys(candidate.place for candidate in candidates))
    keys = len({place.keys for place in places}) > 1
    # One setting says enough where it differs from place to place.
    enough = len({place.keys for place in places}) == len(places)
    settings = [
        " ".join(
            [quoted("model.checkpoint_key", ".".join(place.keys))] * keys
            + [quoted("model.checkpoint_prefix", place.prefix)] * (not enough)
        )
        for place in places
    ]
    return AtlasError(
        f"{path} holds {len(places)} sets of weights that fit this network equally well and have different values. "
        f"Choose one: {', or '.join(settings[:8])}{', …' if len(settings) > 8 else ''}."
    )


def quoted(setting: str, value: str) -> str:
    """`setting=value` as a shell and Hydra take it: in quotes wherever the value is no plain word."""
    if re.fullmatch(r"[A-Za-z_][\w.-]*", value) and value.lower() not in ("true", "false", "null"):
        return f"{setting}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("'", "'\\''")
    return f"'{setting}=\"{escaped}\"'"


def _report(path: Path, best: Candidate, ranked: Sequence[Candidate], left: Sequence[Entry]) -> None:
    """One line in the log on where the weights were found and what of the file was left out."""
    said = [f"weights from {best.place}"] if best.place != Place((), "") else []
    alike = (c for c in ranked if c.place.preference > best.place.preference and c.rank[0] == best.rank[0])
    other = next((c for c in alike if not c.same(best)), None)
    if other is not None:
        key = quoted("model.checkpoint_key", ".".join(other.place.keys))
        prefix = quoted("model.checkpoint_prefix", other.place.prefix)
        setting = key if other.place.keys != best.place.keys else prefix
        said.append(f"averaged weights are preferred ({setting} loads those that are not averaged)")
    if left:
        groups: dict[str, list[str]] = {}
        for entry in left:
            parts = [*entry.keys, *entry.name.split(".")]
            groups.setdefault(".".join(parts[: len(best.place.keys) + 1]), []).append(".".join(parts))
        largest = sorted(groups.items(), key=lambda group: -len(group[1]))
        shown = [f"{label} ({len(names)})" if len(names) > 1 else names[0] for label, names in largest[:6]]
        more = ", …" if len(groups) > 6 else ""
        said.append(f"{len(left)} other tensor{'s' * (len(left) > 1)} left out: {', '.join(shown)}{more}")
    if said:
        _say(logging.INFO, f"{path}: {'; '.join(said)}")


@functools.cache
def _say(level: int, line: str) -> None:
    """Log a line once: plan and workers in the same process load the same checkpoint."""
    log.log(level, "%s", line)
