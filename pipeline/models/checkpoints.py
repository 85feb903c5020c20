"""Load a checkpoint into a network, or report exactly why it does not fit.

A checkpoint is searched for the state dict: it may begin in any nested mapping and at any prefix of its names. The
place is chosen where most of the network's tensors are found with the right shapes.
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

# Keys under which training scripts store the state dict. Of places with equal values, the first in this order is
# reported.
WRAPPERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema",
    "state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "weights", "module",
)  # fmt: skip

# Buffers of batch normalization that do not affect the network in eval mode; old files do not have them.
COUNTER = "num_batches_tracked"


@dataclasses.dataclass(frozen=True)
class StateDictSelector:
    """Which of several state dicts in a checkpoint to load. A field that is None does not restrict the search.

    Attributes:
        key: `model.checkpoint_key`, the dotted keys of the enclosing mappings.
        prefix: `model.checkpoint_prefix`, the common prefix of the names.
    """

    key: str | None = None
    prefix: str | None = None


@dataclasses.dataclass
class Candidate:
    """A place in the file, with the tensors of the network that are found there.

    Attributes:
        place: Where the state dict would begin.
        stem: Common prefix of the network's names that the names of the file lack.
        entries: Tensors of the file, by the network's names.
        exact: Names that match without ignoring the parts that wrappers insert.
        rank: Sort key, smallest first. Candidates whose keys agree in the first three values are equally
            good.
    """

    place: Place
    stem: str = ""
    entries: dict[str, Entry] = dataclasses.field(default_factory=dict)
    exact: set[str] = dataclasses.field(default_factory=set)
    rank: tuple[Any, ...] = ()

    def fitting(self, network_state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the tensors with the same shapes as those of the network, by name."""
        return {
            name: entry.value for name, entry in self.entries.items() if _same_shape(network_state[name], entry.value)
        }

    def same(self, other: "Candidate") -> bool:
        """Return whether both contain the same values for the network."""
        names = {name for name in self.entries if not name.endswith(COUNTER)}
        if names != {name for name in other.entries if not name.endswith(COUNTER)}:
            return False
        return all(_equal(self.entries[name].value, other.entries[name].value) for name in names)


def load_checkpoint(
    module: nn.Module,
    path: Path,
    trust: bool = False,
    strict: bool = True,
    selector: StateDictSelector | None = None,
    content: bytes | None = None,
) -> None:
    """Load a checkpoint into a network. Its state dict may be nested in mappings, and its names may have a prefix.

    Tensors of the file that belong to other modules than the network's are ignored and logged.

    Args:
        module: The network; filled in place.
        path: The checkpoint file.
        trust: Whether to unpickle arbitrary objects, which can run code.
        strict: Whether every tensor must fit. Otherwise those that fit are loaded and the others are logged.
        selector: Which state dict to load, if the file contains several.
        content: Bytes of the file, if it was read before.

    Raises:
        AtlasError: If the file cannot be read, if several different state dicts fit equally well, or if the tensors do
            not fit; the message counts them and names examples.
    """
    selector = selector or StateDictSelector()
    checkpoint = contents(path, trust, content)
    entries = _within_key(checkpoint.entries, selector, path)
    network_state = module.state_dict()
    ranked = _rank_candidates(entries, network_state, selector, path)
    best = ranked[0] if ranked else Candidate(Place((), ""))
    extras, unrelated = _split_unused(checkpoint.entries if ranked else entries, best)
    fitting = best.fitting(network_state)
    missing, unexpected = _fill(module, fitting, extras, _versions(checkpoint, module, best))
    misshapen = {name: entry.value for name, entry in best.entries.items() if name not in fitting}
    missing = sorted(set(missing) - set(misshapen))
    if not missing and not misshapen:
        # A loss or a second network beside the network is harmless; further layers or weights inside it are not.
        first_parts = _first_parts(module, network_state, best.stem)
        unexpected = [
            name
            for name in unexpected
            if _first_part(name.removeprefix(best.stem)) in first_parts and not name.endswith(COUNTER)
        ]
    problems = _problems(missing, sorted(unexpected), misshapen, network_state)
    if problems and (strict or not fitting):
        hint = " model.strict=false loads the tensors that fit." if fitting else " Not one tensor fits."
        where = f" ({best.place})" if fitting and best.place != Place((), "") else ""
        raise AtlasError(f"{path}{where} does not fit this network: {'; '.join(problems)}.{hint}")
    rivals = [c for c in ranked[1:] if c.rank[:3] == best.rank[:3] and not c.same(best)]
    if rivals:
        raise _ambiguous(path, [best, *rivals])
    if problems:
        loaded = f"{len(fitting)} of {len(network_state)} tensors"
        _log_once(logging.WARNING, f"{path} fits in part, {loaded}: {'; '.join(problems)}")
    reported = set(unexpected)
    unused = [*unrelated, *(entry for name, entry in extras.items() if name not in reported)]
    _report(path, best, ranked, unused)


def _within_key(entries: list[Entry], selector: StateDictSelector, path: Path) -> list[Entry]:
    """Return the entries below `model.checkpoint_key`, or all if it is not set."""
    if not selector.key:
        return entries
    selected = [e for e in entries if any(".".join(e.keys[:i]) == selector.key for i in range(1, len(e.keys) + 1))]
    if selected:
        return selected
    counts = Counter(".".join(e.keys[:i]) for e in entries for i in range(1, len(e.keys) + 1))
    if not counts:
        raise AtlasError(
            f"model.checkpoint_key={selector.key}: the tensors of {path} lie under no key. Leave it null. "
            "model.checkpoint_prefix selects tensors by the prefix of their names."
        )
    raise AtlasError(f"model.checkpoint_key={selector.key}: {path} has no such key with tensors. {_listed(counts)}")


def _within_prefix(places: Iterable[Place], selector: StateDictSelector, path: Path) -> set[str]:
    """Return the prefixes of the file that match `model.checkpoint_prefix`.

    That is the prefix itself, or if no name begins with it, those that equal it without the parts that wrappers insert.
    """
    assert selector.prefix is not None
    prefix = selector.prefix if selector.prefix.endswith(".") or not selector.prefix else f"{selector.prefix}."
    counts = Counter(place.prefix for place in places)
    if prefix in counts:
        return {prefix}
    bare = bare_name(prefix.split("."))
    matching = {candidate for candidate in counts if candidate and bare_name(candidate.split(".")) == bare}
    if not matching:
        del counts[""]
        available = _listed(counts) if counts else "Its names have no prefix: leave it null."
        raise AtlasError(f"model.checkpoint_prefix={selector.prefix}: no name in {path} begins with it. {available}")
    return matching


def _listed(counts: Mapping[str, int], limit: int = 8) -> str:
    """Return a sentence with names and their numbers of tensors, to end an error message with."""
    names = sorted(counts, key=lambda name: (name.rstrip(".").count("."), name))
    examples = ", ".join(f"{name} ({counts[name]})" for name in names[:limit])
    return f"It has (with numbers of tensors): {examples}{', …' if len(names) > limit else ''}."


def _rank_candidates(
    entries: Sequence[Entry], network_state: Mapping[str, Any], selector: StateDictSelector, path: Path
) -> list[Candidate]:
    """Return all places where tensors of the network are found, best first."""
    allowed = None
    if selector.prefix is not None:
        allowed = _within_prefix((place for e in entries for place, _ in e.places()), selector, path)
    names_by_stem = _names_by_stem(network_state)
    candidates: dict[tuple[Place, str], Candidate] = {}
    for entry in entries:
        if selector.key is None and of_optimizer(entry.keys):
            continue
        for place, parts in entry.places():
            if allowed is not None and place.prefix not in allowed:
                continue
            raw, bare = ".".join(parts), bare_name(parts)
            for stem, names in names_by_stem.items():
                name = names.get(raw) or names.get(bare)
                if name is None:
                    continue
                candidate = candidates.setdefault((place, stem), Candidate(place, stem))
                exact = stem + raw == name
                if name not in candidate.entries or (exact and name not in candidate.exact):
                    candidate.entries[name] = entry
                if exact:
                    candidate.exact.add(name)
    for candidate in candidates.values():
        candidate.rank = _rank(candidate, network_state, selector)
    return sorted(candidates.values(), key=lambda candidate: candidate.rank)


def _rank(candidate: Candidate, network_state: Mapping[str, Any], selector: StateDictSelector) -> tuple[Any, ...]:
    """Return the sort key of a candidate: first, how many tensors of the network it has with the right shapes."""
    place = candidate.place
    last_key = place.keys[-1] if place.keys else ""
    return (
        -sum(not name.endswith(COUNTER) for name in candidate.fitting(network_state)),
        selector.key is not None and ".".join(place.keys) != selector.key,
        place.preference,
        -len(candidate.entries),
        WRAPPERS.index(last_key) if last_key in WRAPPERS else len(WRAPPERS),
        len(place.keys),
        len(place.prefix),
        len(candidate.stem),
    )


def _names_by_stem(network_state: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the network's names by shortened name, for each stem that all names begin with.

    A builder that wraps a network adds such a stem, which a checkpoint of the inner network lacks.
    """
    parts = [name.split(".") for name in network_state]
    stems = [""]
    for i in range(min(map(len, parts), default=1) - 1):
        if len({name_parts[i] for name_parts in parts}) > 1:
            break
        stems.append(f"{stems[-1]}{parts[0][i]}.")
    names_by_stem = {}
    for stem in stems:
        names = {name.removeprefix(stem): name for name in network_state}
        for short, name in list(names.items()):
            names.setdefault(bare_name(short.split(".")), name)
        names_by_stem[stem] = names
    return names_by_stem


def _split_unused(entries: Iterable[Entry], best: Candidate) -> tuple[dict[str, Entry], list[Entry]]:
    """Split the entries that the best candidate does not use.

    Returns:
        Those at its place, by the names that they would have in the network, and those elsewhere.
    """
    used = {id(entry) for entry in best.entries.values()}
    extras: dict[str, Entry] = {}
    unrelated: list[Entry] = []
    for entry in entries:
        if id(entry) in used:
            continue
        parts = entry.within(best.place)
        name = best.stem + bare_name(parts or ())
        # A name that is already used occurs again, for example in a wrapped copy of the same network.
        if parts is None or name in best.entries or of_optimizer(entry.keys[len(best.place.keys) :]):
            unrelated.append(entry)
        else:
            extras[name] = entry
    return extras, unrelated


def _fill(
    module: nn.Module, fitting: Mapping[str, Any], extras: Mapping[str, Entry], versions: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Load the fitting tensors.

    PyTorch determines what is missing, because modules may rename and complete what older files contain.

    Returns:
        Names that are missing, and names of the file that are not in the network.
    """
    network_state = module.state_dict()
    memory = {n: (t.data_ptr(), t.shape) for n, t in network_state.items() if isinstance(t, Tensor) and t.data_ptr()}
    # Of tensors that share memory, one is enough: safetensors stores no more.
    filled = {memory[name] for name in fitting if name in memory}

    def missing(names: Iterable[str]) -> list[str]:
        return [n for n in names if not n.endswith(COUNTER) and memory.get(n) not in filled]

    def attempt(names: Iterable[str]) -> tuple[list[str], list[str]]:
        state = _StateDict({**fitting, **{name: extras[name].value for name in names}})
        state._metadata = {name: dict(version) for name, version in versions.items()}
        result = module.load_state_dict(state, strict=False)
        return missing(result.missing_keys), list(result.unexpected_keys)

    if missing(set(network_state) - set(fitting)) and extras:
        # A module may convert tensors with names that the network does not have into those that are missing.
        try:
            return attempt(name for name in extras if name not in network_state)
        except Exception as error:
            log.debug("loading failed with tensors that are not in the network: %s", first_line(error))
    try:
        return attempt(())[0], list(extras)
    except Exception as error:
        raise AtlasError(f"PyTorch can't load the checkpoint's tensors into the network: {error}") from error


class _StateDict(dict[str, Any]):
    """A state dict with the attribute in which PyTorch stores the version numbers of modules."""

    _metadata: dict[str, Any]


def _versions(checkpoint: Contents, module: nn.Module, chosen: Candidate) -> dict[str, Any]:
    """Return the version numbers at the chosen place, by the names of the network's modules."""
    modules = {bare_name(name.split(".")): name for name, _ in module.named_modules(remove_duplicate=False)}
    versions = {}
    place, depth = chosen.place, len(chosen.place.keys)
    for keys, metadata in checkpoint.metadata.items():
        if keys[:depth] != place.keys:
            continue
        for name, version in metadata.items():
            path = "".join(f"{part}." for part in (*keys[depth:], name) if part)
            if path.startswith(place.prefix) and isinstance(version, Mapping):
                parts = (chosen.stem + path.removeprefix(place.prefix))[:-1].split(".")
                module_name = modules.get(bare_name(parts))
                if module_name is not None:
                    versions[module_name] = dict(version)
    return versions


def _first_part(name: str) -> str:
    """Return the first part of a name; all numbers become 0, because they count the members of one container."""
    part = name.partition(".")[0]
    return "0" if part.isdigit() else part


def _first_parts(module: nn.Module, tensor_names: Iterable[str], stem: str) -> set[str]:
    """Return the first parts of all names of the network's tensors and modules, without `stem`."""
    module_names = (name for name, _ in module.named_modules() if name.startswith(stem) and name != stem)
    return {_first_part(name.removeprefix(stem)) for name in (*tensor_names, *module_names)}


def _problems(
    missing: Sequence[str], unexpected: Sequence[str], misshapen: Mapping[str, Any], network_state: Mapping[str, Any]
) -> list[str]:
    """Describe each kind of problem with a count and examples."""
    shapes = [f"{k} {_shape(v)} for {_shape(network_state[k])}" for k, v in sorted(misshapen.items())]
    problems = []
    for names, what in ((missing, "missing"), (unexpected, "not in the network"), (shapes, "of another shape")):
        if names:
            verb, noun = ("is", "tensor") if len(names) == 1 else ("are", "tensors")
            problems.append(f"{len(names)} {noun} {verb} {what}, e.g. {', '.join(names[:3])}")
    return problems


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _same_shape(target: Any, value: Any) -> bool:
    """Return whether `value` can be loaded into `target`; in PyTorch's oldest files scalars have the shape (1,)."""
    if not isinstance(target, Tensor) or not isinstance(value, Tensor):
        return isinstance(target, Tensor) == isinstance(value, Tensor)
    return target.shape == value.shape or (target.dim() == 0 and value.shape == (1,))


def _equal(a: Any, b: Any) -> bool:
    if a is b or not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b
    if a.dtype != b.dtype:
        a, b = a.double(), b.double()
    return a.shape == b.shape and torch.equal(a, b)


def _ambiguous(path: Path, candidates: Sequence[Candidate]) -> AtlasError:
    """Return the error for several state dicts that fit equally well, with the settings that select each."""
    places = list(dict.fromkeys(candidate.place for candidate in candidates))
    distinct_keys = len({place.keys for place in places})
    settings = []
    for place in places:
        parts = []
        if distinct_keys > 1:
            parts.append(quoted("model.checkpoint_key", ".".join(place.keys)))
        if distinct_keys < len(places):
            parts.append(quoted("model.checkpoint_prefix", place.prefix))
        settings.append(" ".join(parts))
    return AtlasError(
        f"{path} holds {len(places)} sets of weights that fit this network equally well and have different values. "
        f"Choose one: {', or '.join(settings[:8])}{', …' if len(settings) > 8 else ''}."
    )


def quoted(setting: str, value: str) -> str:
    """Return `setting=value` for a shell and Hydra, in quotes unless the value is a plain word."""
    if re.fullmatch(r"[A-Za-z_][\w.-]*", value) and value.lower() not in ("true", "false", "null"):
        return f"{setting}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("'", "'\\''")
    return f"'{setting}=\"{escaped}\"'"


def _report(path: Path, best: Candidate, ranked: Sequence[Candidate], unused: Sequence[Entry]) -> None:
    """Log in one line where the weights were found and which tensors of the file were not used."""
    notes = [f"weights from {best.place}"] if best.place != Place((), "") else []
    less_preferred = (c for c in ranked if c.place.preference > best.place.preference and c.rank[0] == best.rank[0])
    alternative = next((c for c in less_preferred if not c.same(best)), None)
    if alternative is not None:
        if alternative.place.keys != best.place.keys:
            setting = quoted("model.checkpoint_key", ".".join(alternative.place.keys))
        else:
            setting = quoted("model.checkpoint_prefix", alternative.place.prefix)
        notes.append(f"averaged weights are preferred ({setting} loads those that are not averaged)")
    if unused:
        groups: dict[str, list[str]] = {}
        for entry in unused:
            parts = [*entry.keys, *entry.name.split(".")]
            groups.setdefault(".".join(parts[: len(best.place.keys) + 1]), []).append(".".join(parts))
        largest = sorted(groups.items(), key=lambda group: -len(group[1]))
        examples = [f"{label} ({len(names)})" if len(names) > 1 else names[0] for label, names in largest[:6]]
        more = ", …" if len(groups) > 6 else ""
        notes.append(f"{len(unused)} other tensor{'s' * (len(unused) > 1)} left out: {', '.join(examples)}{more}")
    if notes:
        _log_once(logging.INFO, f"{path}: {'; '.join(notes)}")


@functools.cache
def _log_once(level: int, line: str) -> None:
    """Log a line once: the plan and the workers of one process load the same checkpoint."""
    log.log(level, "%s", line)
