"""Check the names of units by labels where the truth is known, and on a run.

scripts/bench names [--run runs/NAME [--group 1]] [--units 100] [--draws 20]

The truth is known by construction: units respond to one label, in tables of activations of random images. In each of
five levels the images of the label lie so many standard deviations above all others, in one of them those of a second
label little lower, and a share of the images has another label than what is in them. The table has, by level, how many
units have a name and how many of the names are right; and, for comparison, for how many units the most frequent label
of the examples alone is right, which names all of them.

Then the labels are shuffled, `--draws` times: the share of units with a name. It must be at most 5 %.

With `--run`, the same for the examples of a run: how many of its units have a name, and with shuffled labels. With
`--group`, so many neighbors in the order of labels count as one label: those of ImageNet are ordered by meaning.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.names.book import MIN_NAMED_FIELD
from pipeline.names.label_names import LabelNull, name_by_labels
from pipeline.store.reader import open_atlas

# Standard deviations between the images of a unit's label and all others, the same for a second label, and share of
# images with a wrong label.
LEVELS = ((5.0, 0.0, 0.0), (4.0, 3.5, 0.1), (3.0, 0.0, 0.1), (2.0, 0.0, 0.2), (1.0, 0.0, 0.2))

# Number of labels, images of each, and examples of each unit.
DATASETS = ((10, 100, 16), (100, 50, 16), (1000, 50, 16), (100, 10, 9), (1000, 1, 16))


def planted(
    labels: int, each: int, k: int, units: int, seed: int
) -> Iterator[tuple[tuple[float, float, float], np.ndarray, np.ndarray, np.ndarray]]:
    """Yield a level, the examples of its units (units, k), the labels of the images, and the label of each unit."""
    generator = np.random.default_rng(seed)
    content = np.repeat(np.arange(labels), each)
    for level in LEVELS:
        distance, second, wrong = level
        given = np.where(generator.random(len(content)) < wrong, generator.integers(labels, size=len(content)), content)
        truth = generator.integers(labels, size=units)
        examples = np.empty((units, k), np.int64)
        for unit, label in enumerate(truth):
            activations = generator.normal(size=len(content)) + distance * (content == label)
            activations += second * (content == (label + 1) % labels)
            examples[unit] = np.argsort(-activations)[:k]
        yield level, examples, given, truth


def by_construction(units: int, draws: int) -> None:
    print("labels × images, examples | distance, of a second, wrong labels | named, right | most frequent label right")
    generator = np.random.default_rng(1)
    named = right = shuffled_names = shuffled_units = 0
    for labels, each, k in DATASETS:
        null = 0
        for (distance, second, wrong), examples, given, truth in planted(
            labels, each, k, units // len(LEVELS), labels + each
        ):
            found = name_by_labels(examples, LabelNull(given, np.arange(len(given))))
            earned = found.earned
            good = int((found.label == truth)[earned].sum())
            naive = np.array([np.bincount(given[row]).argmax() for row in examples])
            level = f"{labels:4} × {each:3}, {k:2} | {distance:.0f} sd, {second:.1f} sd, {wrong:3.0%}"
            few = int((naive == truth).sum())
            print(f"{level} | {earned.sum():3} of {len(truth)}, {good:3} right | {few:3} of {len(truth)}")
            named, right = named + int(earned.sum()), right + good
            for _ in range(draws):
                mixed = name_by_labels(examples, LabelNull(generator.permutation(given), np.arange(len(given))))
                null += int(mixed.earned.sum())
        of = draws * len(LEVELS) * (units // len(LEVELS))
        shuffled_names, shuffled_units = shuffled_names + null, shuffled_units + of
        print(f"     shuffled labels: {null} of {of:,} units have a name")
    print(f"precision {right / max(named, 1):.3f} ({right} of {named} names)")
    print(f"shuffled labels: {1 - shuffled_names / shuffled_units:.2%} of {shuffled_units:,} units without a name")


def on_run(path: Path, draws: int, group: int) -> None:
    with open_atlas(path) as atlas:
        table = atlas.dataset()
        stored = sorted(set(table["label"]) - {""})
        numbers = {label: number // group for number, label in enumerate(stored)}
        labels = table["label"].map(lambda label: numbers.get(label, -1)).to_numpy(np.int64)
        sources = pd.factorize(table["source"])[0]
        sizes = np.bincount(labels[labels >= 0])
        print(f"{path}: {len(table):,} images, {len(sizes):,} labels, {sizes.min()} to {sizes.max()} images each")
        generator, null = np.random.default_rng(2), LabelNull(labels, sources)
        shuffled = [LabelNull(generator.permutation(labels), sources) for _ in range(draws)]
        units = named = mixed = 0
        for layer in atlas:
            shown, field = layer.examples("max"), layer.receptive_field
            if shown is None or (field is not None and min(field) < MIN_NAMED_FIELD):
                continue
            earned = name_by_labels(shown.index, null).earned
            units, named = units + len(earned), named + int(earned.sum())
            mixed += sum(int(name_by_labels(shown.index, one).earned.sum()) for one in shuffled)
            print(f"  {layer.name}: {earned.sum():,} of {len(earned):,}")
        print(f"{named:,} of {units:,} units with a receptive field for labels have a name")
        share = mixed / max(1, draws * units)
        print(f"shuffled labels, {draws} times: {mixed:,} names, {1 - share:.2%} of the units without one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--group", type=int, default=1)
    parser.add_argument("--units", type=int, default=100)
    parser.add_argument("--draws", type=int, default=20)
    arguments = parser.parse_args()
    by_construction(arguments.units, arguments.draws)
    if arguments.run is not None:
        on_run(arguments.run, arguments.draws, arguments.group)


if __name__ == "__main__":
    main()
