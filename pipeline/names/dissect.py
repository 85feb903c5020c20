"""CLIP-Dissect: which word goes with the images that activate a unit (Oikarinen & Weng 2023, arXiv 2204.10965).

The score is soft-WPMI, section 3.3 of the paper: for a unit k and a word t,

    soft_wpmi(t, k) = log E[p(t | B_k)] − λ log p(t),
    log E[p(t | B_k)] = Σ_x log(1 + p(x ∈ B_k) (p(t | x) − 1)),

where p(t | x) is the softmax over the words of `a` times the cosine of the embeddings of image x and word t, and
p(x ∈ B_k) falls linearly with the rank of the image, from 0.998 to 0.97. p(t) is the mean of E[p(t | B_k)] over the
units of the layer. The constants a = 10, λ = 1 and 10⁻⁷ in the logarithm are those of the authors' code. Here the
images of a unit are the crops of its dataset examples, not whole images of a probe set.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from scipy.special import logsumexp

from pipeline.core.seeds import seed_of
from pipeline.names.label_names import false_discovery_rates

TEMPERATURE = 10.0
WEIGHT = 1.0
FIRST, LAST = 0.998, 0.97
SMALLEST = 1e-7

# Random sets of crops for the null; p values are multiples of 1 / (DRAWS + 1).
DRAWS = 999

# Factors, each at least 0.002, whose product is taken before its logarithm.
FACTORS = 8

# Scores of a layer are kept up to so many numbers, about 256 MB, and computed twice beyond.
KEPT = 1 << 26

# Numbers that a block of scores may have, about 64 MB, to bound memory.
BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True)
class WordNames:
    """The word with the largest score of each of C' units.

    Attributes:
        word: Number of the word, (C',) int32; −1 for a unit without crops.
        score: soft-WPMI, (C',) float32; NaN for a unit without crops.
        p: Probability that some word has as large a score for as many random crops of the layer, (C',) float64.
        q: Rate of false discoveries at which the word is accepted, over the units of the layer, (C',) float64.
    """

    word: np.ndarray
    score: np.ndarray
    p: np.ndarray
    q: np.ndarray


def memberships(count: int) -> np.ndarray:
    """Return p(x ∈ B_k) of the images of a unit by rank, (count,) float32."""
    return (FIRST - np.arange(count) / max(count, 1) * (FIRST - LAST)).astype(np.float32)


def log_expectations(images: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Return log E[p(t | B_k)], (units, words) float32.

    Args:
        images: Embeddings of the images of each unit, the strongest first, (units, k, d) of length 1; zeros for none.
        words: Embeddings of the words, (words, d) of length 1.
    """
    units, k, size = images.shape
    # One product of matrices; exponents are at most TEMPERATURE, so that nothing overflows.
    factors = images.reshape(units * k, size) @ (np.float32(TEMPERATURE) * words).T
    np.exp(factors, out=factors)
    factors = factors.reshape(units, k, len(words))
    there = np.any(images != 0, axis=2) * memberships(k)
    factors *= (there / factors.sum(2, dtype=np.float32))[:, :, None]
    factors += (1 - there + np.float32(SMALLEST))[:, :, None]
    # A sum of logarithms is the logarithm of a product, which stays far from the smallest float32 for few factors.
    result = np.zeros((units, len(words)), np.float32)
    for start in range(0, k, FACTORS):
        result += np.log(factors[:, start : start + FACTORS].prod(1))
    return result


def soft_wpmi(images: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Return the scores of all words for all units of a layer, (units, words) float32; see the module."""
    expectations = log_expectations(images, words)
    return expectations - WEIGHT * (logsumexp(expectations, axis=0) - np.log(len(expectations)))


def name_by_words(images: np.ndarray, words: np.ndarray, name: str) -> WordNames:
    """Name the units of a layer by the word with the largest score, and compare it with random sets of crops.

    Args:
        images: As in `log_expectations`; memory is bounded beside it.
        words: Embeddings of the words, (words, d) of length 1, at least one.
        name: Name of the layer, for the seed of the null.
    """
    units, k = images.shape[:2]
    word, score = np.full(units, -1, np.int32), np.full(units, np.nan, np.float32)
    p = np.ones(units)
    filled = np.any(images != 0, axis=2)
    named = np.flatnonzero(filled.any(1))
    if not len(named):
        return WordNames(word, score, p, p)
    prior = np.full(len(words), -np.inf)
    kept: list[np.ndarray] = []
    for rows in _blocks(len(named), k * len(words)):
        expectations = log_expectations(images[named[rows]], words)
        prior = np.logaddexp(prior, logsumexp(expectations, axis=0))
        if len(named) * len(words) <= KEPT:
            kept.append(expectations)
    prior = (WEIGHT * (prior - np.log(len(named)))).astype(np.float32)
    for number, rows in enumerate(_blocks(len(named), k * len(words))):
        scores = (kept[number] if kept else log_expectations(images[named[rows]], words)) - prior
        word[named[rows]], score[named[rows]] = scores.argmax(1), scores.max(1)
    # Random crops by their number: a unit with fewer crops is compared with sets of as many.
    pool = np.argwhere(filled)
    for count in np.unique(filled[named].sum(1)).tolist():
        members = named[filled[named].sum(1) == count]
        null = _null(images, pool, count, words, prior, name)
        above = len(null) - np.searchsorted(null, score[members] - 1e-6, "left")
        p[members] = (1 + above) / (1 + len(null))
    q = np.ones(units)
    q[named] = false_discovery_rates(p[named])
    return WordNames(word, score, p, q)


def _null(
    images: np.ndarray, pool: np.ndarray, count: int, words: np.ndarray, prior: np.ndarray, name: str
) -> np.ndarray:
    """Return the largest scores of sets of `count` random crops of a layer, ascending, (DRAWS,)."""
    generator = np.random.default_rng(seed_of("words", name, count, len(pool), len(words)))
    largest = np.empty(DRAWS, np.float32)
    for rows in _blocks(DRAWS, count * len(words)):
        drawn = np.stack([generator.choice(len(pool), count, replace=False) for _ in range(rows.stop - rows.start)])
        sets = images[pool[drawn, 0], pool[drawn, 1]]
        largest[rows] = (log_expectations(sets, words) - prior).max(1)
    return np.sort(largest)


def _blocks(count: int, size: int) -> Iterator[slice]:
    """Yield slices of 0 … count whose members have `size` numbers each."""
    step = max(1, BLOCK // max(size, 1))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
