"""All names of the units of an atlas: by people, from labels and by CLIP-Dissect, and which of them are earned."""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.core.hashing import digest_of
from pipeline.core.units import Unit
from pipeline.names import people
from pipeline.names.clip_names import ClipNames, find_clip_names, layer_digest, read_clip_names
from pipeline.names.label_names import FALSE_DISCOVERIES, MIN_CONFIDENCE, LabelNames, LabelNull, name_by_labels
from pipeline.names.readable import readable_labels
from pipeline.store.layer_view import LayerView
from pipeline.store.reader import Atlas, open_atlas

log = logging.getLogger(__name__)

# Least side of a receptive field, in pixels, in which there can be what a label says.
MIN_NAMED_FIELD = 16

PERSON, LABELS, CLIP = people.PERSON, "labels", "clip"

# Columns of the table of names; the first are those of names.csv.
COLUMNS = (*people.COLUMNS, people.METHOD, "support", "examined", "score", "p", "q", "earned")


@dataclasses.dataclass(frozen=True)
class UnitName:
    """A name of a unit.

    Attributes:
        name: The name.
        author: The person, or the method.
        method: "person", "labels" or "clip".
        earned: Whether the name may stand in titles and be found by the search.
        confidence: How sure the person is, or the share of the unit's examples that have the label; None if unknown.
        comment: Comment of the person.
        support: Number of source images with the label among the examples; 0 for other methods.
        examined: Number of source images among the examples; 0 for other methods.
        score: soft-WPMI of CLIP-Dissect; None for other methods.
        p: Probability of as good a name by chance; None for people.
        q: Rate of false discoveries at which the name is accepted; None for people.
    """

    name: str
    author: str
    method: str
    earned: bool
    confidence: float | None = None
    comment: str = ""
    support: int = 0
    examined: int = 0
    score: float | None = None
    p: float | None = None
    q: float | None = None

    def row(self, unit: Unit) -> list[str]:
        """Return the cells of a table of names, as `COLUMNS`."""
        numbers = [None if self.method != LABELS else self.support, None if self.method != LABELS else self.examined]
        cells = [*numbers, self.score, self.p, self.q]
        said = ["" if value is None else f"{value:.6g}" for value in (self.confidence, *cells)]
        return [str(unit), self.name, self.author, said[0], self.comment, self.method, *said[1:], str(self.earned)]


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What a CLIP model says about a unit beside a word; see `names.scores`.

    Attributes:
        model: Name of the model.
        clarity: Mean cosine of pairs of its examples; NaN if it has too few.
        polysemanticity: 1 − the cosine of the centers of two clusters of them; NaN if it has too few.
        similar: The most similar other unit; None if there is none.
        similarity: Its similarity.
    """

    model: str
    clarity: float
    polysemanticity: float
    similar: Unit | None
    similarity: float

    @classmethod
    def of(cls, names: ClipNames, number: int) -> "Meaning":
        """Return what a model says about the unit with a number."""
        similar = int(names.similar[number])
        return cls(
            names.model,
            float(names.clarity[number]),
            float(names.polysemanticity[number]),
            names.unit(similar) if similar >= 0 else None,
            float(names.similarity[number]),
        )


class NameBook:
    """The names of the units of an atlas, by layer, computed on access.

    The first access raises `AtlasError` if names.csv is not valid; the message has the line.

    Args:
        atlas: The atlas; it must remain open.
        folder: Folder with names.csv and the results of CLIP-Dissect; that of the atlas by default.
    """

    def __init__(self, atlas: Atlas, folder: Path | None = None) -> None:
        self._atlas, self.folder = atlas, folder or atlas.path.parent
        self._labelled: dict[str, LabelNames | None] = {}
        self._numbers: dict[str, list[tuple[ClipNames, dict[int, int]]]] = {}
        self._names: dict[str, list[list[UnitName]]] = {}

    @functools.cached_property
    def _people(self) -> Mapping[Unit, Sequence[people.PersonsName]]:
        """Names by people, by unit, in the order of names.csv."""
        file = self.folder / people.FILE
        found: dict[Unit, list[people.PersonsName]] = {}
        for name in people.read_names(file) if file.is_file() else ():
            found.setdefault(name.unit, []).append(name)
        return found

    @functools.cached_property
    def label_names(self) -> tuple[str, ...]:
        """The labels of the dataset as pages show them."""
        return readable_labels(self._atlas.dataset_labels)

    @functools.cached_property
    def _null(self) -> LabelNull | None:
        stored = self._atlas.dataset_labels
        if not stored:
            return None
        table = self._atlas.dataset()
        numbers = {label: number for number, label in enumerate(stored)}
        labels = table["label"].map(lambda label: numbers.get(label, -1)).to_numpy(np.int64)
        return LabelNull(labels, pd.factorize(table["source"])[0])

    def by_labels(self, layer: LayerView) -> LabelNames | None:
        """Return the labels that are most over-represented among the examples of each unit of a layer.

        None without labels or examples, and for receptive fields below `MIN_NAMED_FIELD`: such units see colors and
        edges, not what the label of an image says.
        """
        if layer.name not in self._labelled:
            self._labelled[layer.name] = self._by_labels(layer)
        return self._labelled[layer.name]

    def _by_labels(self, layer: LayerView) -> LabelNames | None:
        field, examples = layer.receptive_field, layer.examples("max")
        if examples is None or self._null is None or (field is not None and min(field) < MIN_NAMED_FIELD):
            return None
        return name_by_labels(examples.index, self._null)

    @functools.cached_property
    def clip(self) -> tuple[ClipNames, ...]:
        """The results of CLIP models, one for each."""
        return tuple(map(read_clip_names, find_clip_names(self.folder)))

    def _examined(self, layer: LayerView) -> list[tuple[ClipNames, dict[int, int]]]:
        """Return the results that are still those of a layer, with the number of the unit by channel."""
        if layer.name not in self._numbers:
            found = []
            for names in self.clip:
                if layer.name not in names.layers:
                    continue
                order = names.layers.index(layer.name)
                if names.layer_digests[order] != layer_digest(self._atlas, layer):
                    log.warning("%s: the results of %s are of other examples, and are left out", layer.name, names.key)
                    continue
                numbers = np.flatnonzero(names.layer == order)
                found.append((names, dict(zip(names.channel[numbers].tolist(), numbers.tolist(), strict=True))))
            self._numbers[layer.name] = found
        return self._numbers[layer.name]

    def meanings(self, layer: LayerView) -> list[list[Meaning]]:
        """Return what CLIP models say about each unit of a layer beside a word, in the order of its channels."""
        return [
            [Meaning.of(names, numbers[channel]) for names, numbers in self._examined(layer) if channel in numbers]
            for channel in layer.channels.tolist()
        ]

    def names(self, layer: LayerView) -> list[list[UnitName]]:
        """Return the names of each unit of a layer, in the order of its channels.

        Earned names come first: those of people by confidence (0.5 if not stated), then the label, then CLIP-Dissect.
        Labels and words of CLIP-Dissect that are not earned follow, as candidates for tables; pages leave them out.
        """
        if layer.name not in self._names:
            self._names[layer.name] = self._all_names(layer)
        return self._names[layer.name]

    def _all_names(self, layer: LayerView) -> list[list[UnitName]]:
        labelled = self.by_labels(layer)
        result = []
        for row, channel in enumerate(layer.channels.tolist()):
            found = [_by_person(name) for name in self._people.get(Unit(layer.name, channel), ())]
            found.sort(key=lambda one: -(MIN_CONFIDENCE if one.confidence is None else one.confidence))
            if labelled is not None and labelled.support[row]:
                found.append(self._label(labelled, row))
            found += [
                _by_word(names, numbers[channel])
                for names, numbers in self._examined(layer)
                if channel in numbers and names.word[numbers[channel]] >= 0
            ]
            result.append(sorted(found, key=lambda one: not one.earned))
        return result

    def _label(self, found: LabelNames, row: int) -> UnitName:
        return UnitName(
            self.label_names[found.label[row]],
            LABELS,
            LABELS,
            bool(found.earned[row]),
            float(found.confidence[row]),
            support=int(found.support[row]),
            examined=int(found.examined[row]),
            p=float(found.p[row]),
            q=float(found.q[row]),
        )

    def absent(self) -> list[Unit]:
        """Return the units of names.csv that are not in the atlas."""
        units = units_of(self._atlas)
        return [unit for unit in self._people if unit.channel not in units.get(unit.layer, frozenset())]

    def digest(self, layer: LayerView) -> str:
        """Return a digest of what pages show of the names of a layer; "" if that is nothing."""
        shown = [[repr(one) for one in names if is_shown(one)] for names in self.names(layer)]
        meant = [list(map(repr, meanings)) for meanings in self.meanings(layer)]
        return digest_of([shown, meant]) if any(shown) or any(meant) else ""

    def table(self, everything: bool = False) -> list[list[str]]:
        """Return the rows of a table of all names, with `COLUMNS`.

        Args:
            everything: Whether labels and words that are not earned are included.
        """
        return [
            one.row(Unit(layer.name, channel))
            for layer in self._atlas
            for channel, names in zip(layer.channels.tolist(), self.names(layer), strict=True)
            for one in names
            if everything or is_shown(one)
        ]


def names_digest(folder: Path) -> str:
    """Return a digest of the files in the folder of an atlas that names are read from."""
    files = [path for path in (folder / people.FILE, *find_clip_names(folder)) if path.is_file()]
    return digest_of([[str(path.relative_to(folder)), sha256(path.read_bytes()).hexdigest()] for path in files])


def _by_person(name: people.PersonsName) -> UnitName:
    sure = name.confidence is None or name.confidence >= MIN_CONFIDENCE
    return UnitName(name.name, name.author, PERSON, sure, name.confidence, name.comment)


def _by_word(names: ClipNames, number: int) -> UnitName:
    q = float(names.q[number])
    return UnitName(
        names.words[names.word[number]],
        f"CLIP-Dissect, {names.model}",
        CLIP,
        q <= FALSE_DISCOVERIES,
        score=float(names.score[number]),
        p=float(names.p[number]),
        q=q,
    )


def is_shown(name: UnitName) -> bool:
    """Return whether pages show a name: every name by a person, others only if they are earned."""
    return name.earned or name.method == PERSON


def earned_words(names: Sequence[UnitName]) -> list[str]:
    """Return the different names of a unit that are earned, the one for titles first."""
    return list(dict.fromkeys(one.name for one in names if one.earned))


def units_of(atlas: Atlas) -> dict[str, frozenset[int]]:
    """Return the channels of an atlas by layer."""
    return {layer.name: frozenset(layer.channels.tolist()) for layer in atlas}


def unit_names(path: str | Path, everything: bool = False) -> pd.DataFrame:
    """Return the names of the units of a run or atlas as a table, one row per name.

    Args:
        path: The folder of a run, or its atlas.h5.
        everything: Whether names that are not earned are included, as candidates.
    """
    with open_atlas(path) as atlas:
        table = pd.DataFrame(NameBook(atlas).table(everything), columns=list(COLUMNS))
    for column in ("confidence", "support", "examined", "score", "p", "q"):
        table[column] = pd.to_numeric(table[column])
    table["earned"] = table["earned"] == "True"
    return table
