"""Readable names of dataset labels, which are often names of folders."""

import functools
import importlib.util
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

# A noun of WordNet, as the folders of ImageNet are called: "n01440764", "n01440764_tench".
_SYNSET = re.compile(r"(n\d{8})(?:[\s_-]+(.*))?")


def readable_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the labels as pages show them: no numbers of synsets, and spaces for underscores.

    A label that is only the number of a synset gets the first word that timm's table has for it. Labels whose names
    would be equal keep what tells them apart: "crane (n02012849)" and "crane (n03126707)".

    Args:
        labels: Different labels, in any order.

    Returns:
        The names, in the same order; different labels have different names.
    """
    names = [_name(label) for label in labels]
    count = Counter(names)
    return tuple(
        name if count[name] == 1 else _distinct(label, name) for label, name in zip(labels, names, strict=True)
    )


def _name(label: str) -> str:
    synset = _SYNSET.fullmatch(label)
    text = label if synset is None else synset.group(2) or _first_words().get(synset.group(1), "")
    return " ".join(text.replace("_", " ").split()) or label


def _distinct(label: str, name: str) -> str:
    synset = _SYNSET.fullmatch(label)
    return label if synset is None else f"{name} ({synset.group(1)})"


@functools.cache
def _first_words() -> dict[str, str]:
    """Return the first word of each synset in timm's table; empty if timm does not have the table."""
    spec = importlib.util.find_spec("timm")
    folders = (spec.submodule_search_locations if spec else None) or ()
    for folder in folders:
        table = Path(folder) / "data" / "_info" / "imagenet_synset_to_lemma.txt"
        if table.is_file():
            rows = (line.split("\t") for line in table.read_text(encoding="utf-8").splitlines())
            return {row[0]: row[1].split(",")[0] for row in rows if len(row) == 2}
    return {}
