"""Similar units over all layers: the search, and the files of a site."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.site.data import similar_units
from pipeline.site.layout import embedding, similarity
from pipeline.store.reader import open_atlas
from tests.site.test_site import SMALL, build, contents, shard, write_atlas


def brute_force(vectors: np.ndarray, count: int, least: float) -> tuple[np.ndarray, np.ndarray]:
    wide = vectors.astype(np.float64)
    correlations = np.round(wide @ wide.T, similarity.DECIMALS)
    np.fill_diagonal(correlations, -2)
    correlations[:, ~vectors.any(1)] = -2
    correlations[~vectors.any(1)] = -2
    order = np.argsort(-correlations, axis=1, kind="stable")[:, :count]
    values = np.take_along_axis(correlations, order, 1)
    missing = count - order.shape[1]
    order, values = np.pad(order, ((0, 0), (0, missing))), np.pad(values, ((0, 0), (0, missing)), constant_values=-2)
    return np.where(values >= least, order, -1), np.where(values >= least, values, 0)


def responses_of(kind: str) -> np.ndarray:
    rng = np.random.default_rng(1)
    made = {
        "of few axes": rng.normal(size=(700, 12)) @ rng.normal(size=(12, 150)),
        "noise": rng.normal(size=(700, 150)),
        "of many axes": rng.normal(size=(700, 100)) / np.arange(1, 101) @ rng.normal(size=(100, 150)),
        "repeated": np.repeat(rng.normal(size=(20, 150)), 35, 0),
        "silent": np.concatenate([rng.normal(size=(300, 30)), np.zeros((50, 30))]),
        "few": rng.normal(size=(4, 30)),
    }
    return made[kind]


@pytest.mark.parametrize("kind", ["of few axes", "noise", "of many axes", "repeated", "silent", "few"])
@pytest.mark.parametrize("block", [similarity.BLOCK, 4096])
def test_the_search_finds_what_comparing_all_pairs_finds(kind, block, monkeypatch):
    monkeypatch.setattr(similarity, "BLOCK", block)
    vectors = embedding.unit_vectors([responses_of(kind)])
    assert vectors is not None
    for count in (1, 8):
        expected = brute_force(vectors, count, 0.2)
        found = similarity.most_similar(vectors, count, 0.2)
        assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
    assert (found[0] >= 0).any() == (kind != "few" or bool((expected[0] >= 0).any()))


def test_units_of_all_layers_are_compared(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    build(path)
    site = tmp_path / "site"
    with open_atlas(path) as atlas:
        layers = [(layer.name, layer.channels.tolist()) for layer in atlas]
        vectors = embedding.unit_vectors([layer.dataset_activations() for layer in atlas])
    names = [f"{name}:{channel}" for name, channels in layers for channel in channels]
    assert vectors is not None
    numbers, values = brute_force(vectors, SMALL.similar, similar_units.LEAST)
    told = json.loads((site / similar_units.API_FILE).read_text())
    assert list(told["units"]) == names and told["least"] == similar_units.LEAST
    tiny = {name: shard(site, f"{slug}/layer")["tiny"] for name, slug in _slugs(site).items()}
    shown = shard(site, "similar/0")
    for unit, name in enumerate(names):
        expected = [(names[n], value) for n, value in zip(numbers[unit], values[unit], strict=True) if n >= 0]
        assert [(f"{layer}:{channel}", value) for layer, channel, value in told["units"][name]] == expected
        for at, (other, value) in enumerate(expected):
            order, channel, correlation, rank = shown[unit][4 * at : 4 * at + 4]
            layer, channels = layers[order]
            assert (f"{layer}:{channel}", correlation) == (other, value)
            assert rank == tiny[layer][channels.index(channel)]
    assert any(layer != name.rpartition(":")[0] for name in names for layer, _, _ in told["units"][name])
    assert json.loads((site / "api/v1/index.json").read_text())["similar"] == similar_units.API_FILE


def _slugs(site: Path) -> dict[str, str]:
    return {layer[0]: layer[1] for layer in shard(site, "index")["layers"]}


def test_activations_of_one_layer_change_only_small_files(tmp_path):
    """A rebuild gives the bytes of a first build, although units of all layers are compared with each other."""
    path = write_atlas(tmp_path / "atlas.h5")
    build(path)
    before = contents(tmp_path / "site")
    with h5py.File(path, "r+") as file:
        values = file["layers/stem/responses"]
        assert isinstance(values, h5py.Dataset)
        values[...] = np.random.default_rng(5).normal(size=values.shape)
    assert build(path).rebuilt_units == 6
    after = contents(tmp_path / "site")
    build(path, tmp_path / "fresh")
    assert after == contents(tmp_path / "fresh")
    changed = {name for name in after if after[name] != before.get(name)}
    assert {"data/similar/0.js", similar_units.API_FILE} <= changed
    assert not [
        name for name in changed if name.startswith(("media/head", "data/head", "data/blocks", "api/v1/units/b"))
    ]


def test_unchanged_activations_are_not_compared_again(tmp_path, monkeypatch):
    path = write_atlas(tmp_path / "atlas.h5")
    build(path)
    before = contents(tmp_path / "site/data/similar")
    monkeypatch.setattr(similar_units, "most_similar", None)
    assert build(write_atlas(path, seed=9)).rebuilt_units == 6
    assert contents(tmp_path / "site/data/similar") == before
