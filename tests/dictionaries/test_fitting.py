"""Dictionaries fitted to activations, on made data where the answer is known, and the command on a small network."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, main
from safetensors import safe_open
from safetensors.torch import load, save

from pipeline.core.errors import AtlasError
from pipeline.dictionaries import autoencoder, decompositions, fitting
from pipeline.dictionaries.autoencoder import TrainingState
from pipeline.dictionaries.concepts import fit_concept
from pipeline.dictionaries.config import DictionaryConfig
from pipeline.dictionaries.evaluation import evaluate
from pipeline.layers.dictionary_files import METADATA, dictionary_of, read_dictionary


def config(**settings: object) -> DictionaryConfig:
    return DictionaryConfig(layer="late", out="x.safetensors", **settings)  # type: ignore[arg-type]


def planted(rows: int = 6000, channels: int = 16, parts: int = 24, active: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return rows that are sums of a few of many directions, and the directions."""
    generator = np.random.default_rng(0)
    directions = generator.standard_normal((parts, channels))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    values = np.zeros((rows, parts))
    for row in values:
        row[generator.permutation(parts)[:active]] = generator.uniform(1, 3, active)
    return (values @ directions + 5).astype(np.float32), directions


def test_a_sparse_autoencoder_finds_the_directions_that_data_are_made_of() -> None:
    rows, directions = planted()
    asked = config(latents=32, k=2, steps=1000, batch=128, rate=3e-3)
    arrays = autoencoder.train(rows, asked, autoencoder.initial_state(16, 32, 0))
    nearest = (directions @ arrays["W_dec"].T).max(1)
    assert (nearest > 0.9).mean() >= 0.9
    np.testing.assert_allclose(np.linalg.norm(arrays["W_dec"], axis=1), 1, atol=1e-5)
    dictionary = dictionary_of(arrays, {"gate": "topk", "k": 2}, "test")
    fit = evaluate(dictionary, rows[:5000], rows[5000:])
    assert fit.explained_variance > 0.85 and 0 < fit.l0 <= 2
    # A dictionary of random directions does not.
    random = autoencoder.train(rows, dataclasses.replace(asked, rate=1e-9), autoencoder.initial_state(16, 32, 1))
    assert evaluate(dictionary_of(random, {"gate": "topk", "k": 2}, "test"), rows, rows).explained_variance < 0.6


def test_training_that_goes_on_gives_the_same() -> None:
    rows, _ = planted(500)
    asked = config(latents=20, k=2, steps=12, batch=64)
    whole = autoencoder.train(rows, asked, autoencoder.initial_state(16, 20, 0))

    class Stopped(Exception):
        pass

    stored: list[bytes] = []

    def stop(state: TrainingState, _: float) -> None:
        if state.step == 7:
            stored.append(save(state.tensors()))
            raise Stopped

    with pytest.raises(Stopped):
        autoencoder.train(rows, asked, autoencoder.initial_state(16, 20, 0), stop)
    state = TrainingState.of(7, load(stored[0]))
    rest = autoencoder.train(rows, asked, state)
    for name, array in whole.items():
        np.testing.assert_array_equal(rest[name], array)


def test_dead_latents_are_revived(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = planted(1000)
    asked = config(latents=48, k=2, steps=300, batch=128, rate=3e-3)

    def dead() -> float:
        start = autoencoder.initial_state(16, 48, 0)
        start.parameters["b_enc"][24:] = -3  # these hardly ever win
        arrays = autoencoder.train(rows, asked, start)
        return evaluate(dictionary_of(arrays, {"gate": "topk", "k": 2}, "test"), rows, rows).dead

    with_loss = dead()
    monkeypatch.setattr(autoencoder, "AUXILIARY", 0.0)
    assert with_loss < dead() - 0.1


def test_principal_components() -> None:
    rows, _ = planted(800)
    arrays, gate = decompositions.decompose(rows, config(method="pca", latents=16))
    dictionary = dictionary_of(arrays, {"gate": gate}, "test")
    assert evaluate(dictionary, rows, rows).explained_variance == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(arrays["W_dec"] @ arrays["W_dec"].T, np.eye(16), atol=1e-5)


def test_independent_components() -> None:
    generator = np.random.default_rng(0)
    sources = generator.laplace(size=(4000, 4))
    mixing = generator.standard_normal((4, 6))
    arrays, _ = decompositions.decompose((sources @ mixing + 1).astype(np.float32), config(method="ica", latents=4))
    found = (sources @ mixing + 1) @ arrays["W_enc"] + arrays["b_enc"]
    correlation = np.abs(np.corrcoef(sources.T, found.T)[:4, 4:])
    assert (correlation.max(1) > 0.95).all()


def test_non_negative_parts() -> None:
    generator = np.random.default_rng(0)
    parts = np.kron(np.eye(3), np.ones(4))
    rows = (generator.exponential(size=(600, 3)) * (generator.random((600, 3)) < 0.4)) @ parts
    arrays, gate = decompositions.decompose(rows.astype(np.float32), config(method="nmf", latents=3))
    assert gate == "relu"
    similarity = arrays["W_dec"] @ parts.T / 2
    assert (similarity.max(1) > 0.99).all()


def test_whitened_directions() -> None:
    generator = np.random.default_rng(0)
    rows = (generator.standard_normal((5000, 3)) * [3, 1, 0.5] + [1, 2, 3]).astype(np.float32)
    arrays = decompositions.directions(np.array([[1.0, 1.0, 1.0]]), rows)
    covariance = np.cov(rows.T.astype(float))
    covariance += decompositions.SHRINKAGE * np.trace(covariance) / 3 * np.eye(3)
    np.testing.assert_allclose(arrays["W_enc"][:, 0], np.linalg.inv(covariance) @ np.ones(3), rtol=1e-4)
    assert abs(float(np.mean(rows @ arrays["W_enc"] + arrays["b_enc"]))) < 1e-3


def test_concepts_and_shuffled_folders() -> None:
    generator = np.random.default_rng(0)
    shown, others = generator.standard_normal((60, 40)), generator.standard_normal((60, 40))
    shown[:, 3] += 3
    concept = fit_concept(shown, others, 0)
    assert concept.accuracy > 0.8 and concept.p_value < 0.05
    assert int(np.abs(concept.arrays["W_dec"][0]).argmax()) == 3
    every = np.concatenate([shown, others])
    refuted = 0
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(120)
        shuffled = fit_concept(every[order[:60]], every[order[60:]], seed)
        refuted += shuffled.p_value >= 0.05 and shuffled.accuracy < 0.7
    assert refuted >= 8
    with pytest.raises(AtlasError, match="at least 10 images"):
        fit_concept(shown[:5], others, 0)


# The command

LAYER = "blocks.1.0.conv_exp"


@pytest.fixture
def command(photo_folder: Path, tmp_path: Path) -> list[str]:
    return [*TINY, "data=folder", f"data.root={photo_folder}", f"layer={LAYER}", f"out={tmp_path}/found.safetensors"]


@pytest.mark.parametrize("method", ["topk", "pca", "ica", "nmf"])
def test_the_command_writes_a_dictionary(
    command: list[str], tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["dictionary", *command, f"method={method}", "latents=6", "k=2", "steps=5", "batch=32", "rate=1e-3"]
    assert main(arguments) == 0
    assert f"layers.dictionary={tmp_path}/found.safetensors@{LAYER}" in capsys.readouterr().out
    dictionary = read_dictionary(tmp_path / "found.safetensors", "test")
    assert (dictionary.latents, dictionary.channels) == (6, 64)
    facts = dict(dictionary.facts)
    assert facts["method"] == method and float(facts["explained variance"]) <= 1
    first = (tmp_path / "found.safetensors").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "found.safetensors").read_bytes() == first


def test_interrupted_training_goes_on(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["dictionary", *command, "latents=16", "k=2", "steps=12", "batch=32"]
    assert main(arguments) == 0
    whole = (tmp_path / "found.safetensors").read_bytes()
    (tmp_path / "found.safetensors").unlink()
    monkeypatch.setattr(fitting, "STORE_SECONDS", -1.0)
    step = autoencoder._step

    def interrupted(state: TrainingState, *rest: object) -> float:
        if state.step == 5:
            raise KeyboardInterrupt
        return step(state, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(autoencoder, "_step", interrupted)
    assert main(arguments) == 130
    monkeypatch.setattr(autoencoder, "_step", step)
    assert (tmp_path / "found.safetensors.partial").is_file()
    assert main(arguments) == 0
    assert "training goes on from step 5 of 12" in capsys.readouterr().err
    assert (tmp_path / "found.safetensors").read_bytes() == whole
    assert not (tmp_path / "found.safetensors.partial").exists()


def test_a_concept_from_two_folders(command: list[str], tmp_path: Path, photo_folder: Path) -> None:
    for name, chosen in (("fine", range(8, 20)), ("coarse", range(10))):
        (tmp_path / name).mkdir()
        for i in chosen:
            source = next(photo_folder.rglob(f"{i:02d}.png"))
            (tmp_path / name / source.name).write_bytes(source.read_bytes())
    folders = [f"positive={tmp_path}/fine", f"negative={tmp_path}/coarse"]
    assert main(["dictionary", *command, "method=concept", *folders]) == 0
    with safe_open(tmp_path / "found.safetensors", "numpy") as file:
        facts = json.loads(file.metadata()[METADATA])["facts"]
    assert facts["concept"] == "fine" and 0 <= facts["accuracy"] <= 1 and 0 < facts["p"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layer="], "needs layer="),
        (["layer=blocks.9"], "has no layer 'blocks.9'"),
        (["out=found.npz"], "must be a .safetensors file"),
        (["k=99", "latents=8"], "k=99 is more than the number of latents, 8"),
        (["method=som"], "method='som' is not one of topk, pca"),
        (["latents=many"], "latents='many' has the wrong type"),
        (["method=pca", "latents=65"], "pca finds at most 64"),
        (["method=directions"], "needs vectors="),
        (["method=concept"], "needs two folders"),
    ],
)
def test_bad_input_is_refused(
    command: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {argument.partition("=")[0] for argument in arguments}
    kept = [argument for argument in command if argument.partition("=")[0] not in keys]
    assert main(["dictionary", *kept, *arguments]) == 2
    assert message in capsys.readouterr().err
