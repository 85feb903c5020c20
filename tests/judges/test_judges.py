"""Transfer to other networks: chance for what has nothing to do with the unit, and success for what is the same."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyNet, tiny_model
from PIL import Image

import pipeline
from pipeline.cli.compose import compose
from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.judges.judge import Judge, feature_layers, resize
from pipeline.judges.recognition import recognize
from pipeline.judges.ridge import MIN_CORRELATION, MIN_IMAGES, FeatureSpace
from pipeline.layers import selection
from pipeline.layers.selection import LayersConfig
from pipeline.models.loading import Model, prepare_module
from pipeline.store import shards, writer

IMAGES, FEATURES = 600, 12


def folds(count: int) -> np.ndarray:
    return np.arange(count) % 3


# ------------------------------------------------------------------------------------------------------------ classes


def test_rank_and_probability_are_those_of_the_softmax() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1], [0.2, 0.2, 0.6]], np.float32))
    rank, probability = recognize(logits, np.array([0, 2, 1]))
    assert rank.tolist() == [1, 3, 2] and probability == pytest.approx([0.7, 0.1, 0.2], rel=1e-5)


def test_extreme_logits_neither_overflow_nor_pass() -> None:
    logits = np.array([[1e4, -1e4, 0], [np.nan, 1, 0], [-1e4, 1e4, 0]], np.float32)
    rank, probability = recognize(logits, np.array([0, 1, 0]))
    assert rank[0] == 1 and probability[0] == 1 and rank[2] == 3 and probability[2] == 0
    assert np.isnan(rank[1]) and np.isnan(probability[1])


def test_random_logits_give_chance() -> None:
    rng = np.random.default_rng(0)
    rank, probability = recognize(rng.normal(size=(4000, 101)), rng.integers(0, 101, 4000))
    assert rank.mean() == pytest.approx(51, abs=2) and probability.mean() == pytest.approx(1 / 101, rel=0.1)


# ------------------------------------------------------------------------------------------------------- hidden units


def dataset(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of dataset images, and three units: a direction, the same with noise, and one of its own."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(IMAGES, FEATURES)) * np.geomspace(0.1, 10, FEATURES)
    direction = features @ (rng.normal(size=FEATURES) / np.geomspace(0.1, 10, FEATURES))
    noisy = direction + direction.std() * rng.normal(size=IMAGES)
    return features, np.stack([direction, noisy, rng.normal(size=IMAGES)], 1)


def test_held_out_correlation_tells_a_direction_from_noise() -> None:
    features, units = dataset()
    match = FeatureSpace(features, folds(IMAGES), [4, 8]).match(units)
    exact, noisy, unrelated = match.correlation
    assert exact > 0.999
    assert noisy == pytest.approx(0.5**0.5, abs=0.08)  # the noise has as much variance as the direction
    assert abs(unrelated) < 0.2


def test_more_features_than_images_do_not_inflate_the_correlation() -> None:
    # In-sample, so many features fit any unit exactly.
    rng = np.random.default_rng(1)
    space = FeatureSpace(rng.normal(size=(240, 1000)), folds(240), [1000])
    assert np.abs(space.match(rng.normal(size=(240, 20))).correlation).mean() < 0.12


def test_the_penalty_is_that_of_leave_one_out_by_refitting() -> None:
    features, units = dataset(2)
    fold = FeatureSpace(features, folds(IMAGES), [FEATURES]).folds[0]
    fit = fold.fit(units[:, 1:2])
    train, target = fold._train, units[~fold.held_out, 1]
    errors = []
    for penalty in fold._penalties:
        squares = []
        for left_out in range(0, len(target), 8):
            keep = np.arange(len(target)) != left_out
            mean_x, mean_y = train[keep].mean(0), target[keep].mean()
            x, y = train[keep] - mean_x, target[keep] - mean_y
            weights = np.linalg.solve(x.T @ x + penalty * np.eye(FEATURES), x.T @ y)
            squares.append((target[left_out] - mean_y - (train[left_out] - mean_x) @ weights) ** 2)
        errors.append(np.mean(squares))
    penalty = fold._penalties[int(np.argmin(errors))]
    x, y = train, target - target.mean()
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(FEATURES), x.T @ y)
    expected = target.mean() + fold._standardized(features[fold.held_out]) @ weights
    assert np.corrcoef(fit.predictions[:, 0], expected)[0, 1] > 0.999


def test_a_visualization_passes_and_noise_does_not() -> None:
    features, units = dataset()
    match = FeatureSpace(features, folds(IMAGES), [FEATURES]).match(units)
    seen = features[np.argsort(units[:, 0])[-3:]]  # what the unit responds to most
    noise = np.random.default_rng(3).normal(size=(200, FEATURES)) * np.geomspace(0.1, 10, FEATURES)
    zeros = np.zeros(3, int)
    assert (match.place(seen, zeros).quantile > 0.97).all() and (match.place(seen, zeros).deviations > 1.5).all()
    passed = match.place(noise, np.zeros(200, int))
    assert passed.quantile.mean() == pytest.approx(0.5, abs=0.08) and (passed.quantile > 0.97).mean() < 0.1
    assert (match.place(features.mean(0, keepdims=True), zeros[:1]).quantile < 0.8).all()
    # A unit that the judge cannot express gets no number.
    unmatched = match.place(seen, np.full(3, 2))
    assert match.correlation[2] < MIN_CORRELATION and np.isnan(unmatched.quantile).all()


def test_features_beyond_the_dataset_are_not_extrapolated() -> None:
    features, units = dataset()
    match = FeatureSpace(features, folds(IMAGES), [FEATURES]).match(units)
    far, limit = features.max(0) * 1e6, features.max(0)
    columns = np.zeros(1, int)
    assert match.place(far[None], columns).deviations == pytest.approx(match.place(limit[None], columns).deviations)


def test_constant_units_and_features_have_no_number_and_no_warning() -> None:
    features, units = dataset()
    features[:, 3] = 7.0
    units[:, 2] = 0.0
    match = FeatureSpace(features, folds(IMAGES), [FEATURES]).match(units)
    assert np.isnan(match.correlation[2]) and match.correlation[0] > 0.8
    assert np.isnan(match.place(features[:1], np.array([2])).quantile).all()


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match=f"at least {MIN_IMAGES}"):
        FeatureSpace(np.zeros((MIN_IMAGES - 1, 2)), folds(MIN_IMAGES - 1), [2])


# ------------------------------------------------------------------------------------------------------------- judges


def judge_of(model: Model, name: str = "judge") -> Judge:
    layers = selection.list_layers(model, LayersConfig())
    return Judge(name, model, selection.logit_layers(model, layers)[-1], feature_layers(model, layers))


def photographs(count: int, size: int = 32) -> torch.Tensor:
    """Smooth noise of different scales, (count, 3, size, size)."""
    images = []
    for i in range(count):
        rng = np.random.default_rng(i)
        coarse = torch.from_numpy(rng.random((1, 3, 3 + i % 9, 3 + i % 7), np.float32))
        images.append(resize(coarse, (size, size)))
    return torch.cat(images)


def random_model(seed: int) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dataclasses.replace(tiny_model(), module=prepare_module(TinyNet()))


def test_a_judge_that_is_the_network_agrees_and_a_random_one_does_not() -> None:
    network, images = tiny_model(), photographs(150)
    itself = judge_of(network)
    with torch.no_grad():
        logits = network.module(network.normalize(images)).numpy()
    best = logits.argmax(1)
    rank, _ = recognize(itself.class_logits(images), best)
    assert (rank == 1).all()
    other, _ = recognize(judge_of(random_model(9)).class_logits(images), best)
    assert other.mean() > 1.5

    late = next(layer for layer in itself.layers if layer.name == "late")
    offset = sum(2 * layer.channels for layer in itself.layers[: itself.layers.index(late)])
    features = itself.features(images, (32, 32))
    peaks = features[:, offset + late.channels : offset + 2 * late.channels]
    match = FeatureSpace(features, folds(150), itself.feature_sizes).match(peaks)
    assert np.nanmin(match.correlation) > 0.97


def test_images_keep_their_scale_for_hidden_units() -> None:
    judge = judge_of(tiny_model(size=64))
    images = photographs(2, 16)
    # Half of the network's input is half of the judge's.
    assert np.array_equal(judge.features(images, (32, 32)), judge._pooled(images, (32, 32)))
    assert judge.class_logits(images) == pytest.approx(judge.class_logits(resize(images, (64, 64))), abs=1e-5)


# ------------------------------------------------------------------------------------------------------------- runs

JUDGED = [
    "judges=[timm]",
    "judges.timm.name=test_efficientnet",
    "judges.timm.weights=null",
    "judges.timm.input_size=64",
]


def rows(folder: Path) -> dict[str, np.ndarray]:
    with pipeline.open_atlas(folder) as atlas:
        return {
            f"{layer.name}/{name}": values
            for layer in atlas
            for judgement in layer.judgements()
            for name, values in judgement.numbers.items()
        }


def judge_shards(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "shards" / "judges").rglob("*.h5")}


@pytest.mark.long
def test_a_run_shows_its_visualizations_to_a_judge_once(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    tiny_run = [*tiny_run, "layers.include=[conv_stem,classifier]"]
    assert main(["run", *tiny_run]) == 0
    with pipeline.open_atlas(folder) as atlas:
        assert atlas["classifier"].judgements() == () and not any("timm" in name for name in atlas.units().columns)
    assert "judges" not in (folder / "config.yaml").read_text() and not judge_shards(folder)

    # A judge is added to the finished run: nothing is rendered again. 20 images are too few for hidden units.
    times = {path: path.stat().st_mtime_ns for path in (folder / "shards").rglob("*.h5")}
    assert main(["run", *tiny_run, *JUDGED]) == 0
    assert "timm does not judge hidden units: activations of 20 dataset images are stored" in capsys.readouterr().err
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    numbers = rows(folder)
    assert set(numbers) == {"classifier/rank", "classifier/probability"}
    assert numbers["classifier/rank"].shape == (3, 1) and (numbers["classifier/rank"] >= 1).all()
    with pipeline.open_atlas(folder) as atlas:
        table = atlas.units()
        judged = table[table["layer"] == "classifier"]
        assert judged["timm.rank"].tolist() == numbers["classifier/rank"][:, 0].tolist()
        assert table[table["layer"] != "classifier"]["timm.rank"].isna().all()
        assert atlas["classifier"].judgements()[0].weights == atlas.attributes["weights_sha256"]
    assert writer.verify(folder / "atlas.h5", {}) == []

    # Again: nothing is judged, and atlas.h5 is not written.
    before, made = judge_shards(folder), (folder / "atlas.h5").stat().st_mtime_ns
    assert main(["run", *tiny_run, *JUDGED]) == 0
    assert judge_shards(folder) == before and (folder / "atlas.h5").stat().st_mtime_ns == made
    assert "looks at 3 visualizations" not in capsys.readouterr().err.rpartition("Nothing is missing")[2]

    # More channels: only the new ones are judged, also if the shards of visualizations are gone.
    assert main(["compact", str(folder)]) == 0
    assert main(["run", *tiny_run, *JUDGED, "layers.channels=0:5", "run.update=true"]) == 0
    assert "looks at 2 visualizations of classifier" in capsys.readouterr().err
    more = rows(folder)
    assert np.array_equal(more["classifier/rank"][:3], numbers["classifier/rank"])
    assert all(judge_shards(folder)[path] == time for path, time in before.items())

    # Visualizations are copied from the judged atlas of a base run, without its judgements.
    assert main(["run", *tiny_run, "run.name=copy", f"base={folder}"]) == 0
    assert "looks at" not in capsys.readouterr().err
    with pipeline.open_atlas(tmp_path / "copy") as atlas, pipeline.open_atlas(folder) as judged_atlas:
        assert atlas["classifier"].judgements() == ()
        assert np.array_equal(atlas["classifier"].image(1), judged_atlas["classifier"].image(1))


@pytest.mark.long
def test_hidden_units_are_matched_on_the_dataset_images(tiny_run: list[str], tmp_path: Path) -> None:
    root = tmp_path / "many"
    root.mkdir()
    for i, image in enumerate(photographs(90, 70)):
        Image.fromarray((image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(root / f"{i:02d}.png")
    layers = "layers.include=[conv_stem,blocks.1.0.*,classifier]"
    run = [*tiny_run, *JUDGED, f"data.root={root}", layers, "also=[negative]"]
    assert main(["run", *run, "also.negative.steps=4", "also.negative.size=32"]) == 0
    folder = tmp_path / "tiny"
    with pipeline.open_atlas(folder) as atlas:
        for layer in atlas:
            if layer.name == "classifier":
                assert [one.kind for one in layer.judgements()] == ["class"] and not layer.judgements("negative")
                continue
            for preset in layer.presets:
                (judgement,) = layer.judgements(preset)
                correlation, quantile = judgement.numbers["correlation"], judgement.numbers["quantile"]
                # The judge is the network itself, whose block outputs are close to its layers inside the block.
                assert judgement.kind == "unit" and np.nanmedian(correlation) > 0.5
                if layer.render_attributes(preset)["objective"] == "energy":
                    assert layer.name == "conv_stem" and preset != "negative"
                    assert (correlation >= MIN_CORRELATION).any() and np.isnan(judgement.numbers["deviations"]).all()
                    assert np.isnan(quantile).all()
                    continue
                assert ((quantile >= 0) & (quantile <= 1))[correlation >= MIN_CORRELATION].all()
                assert np.isnan(quantile[~(correlation >= MIN_CORRELATION)]).all()
    features = [shard for path in judge_shards(folder) if (shard := shards.read(path)) and "features" in path.name]
    assert [len(shard.arrays()["index"]) for shard in features] == [90]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["judges=[efficientnet_lite9]"],
            "judges: there is no network 'efficientnet_lite9'. Nearest: eff",
        ),
        ([*JUDGED, "judges.timm.labels=[cat,dog]"], "judges.timm has no classifier with class names"),
        ([*JUDGED, "judges.timm.arguments={num_classes: 7}"], "judges.timm has no classifier with class names"),
        ([*JUDGED, "judges.timm.channels=1"], "judges.timm needs images of 1 channels"),
        ([*JUDGED, "judges.timm.name=test_efficientnat"], "judges.timm: timm has no model 'test_efficientnat'"),
        ([*JUDGED, "judges.timm.sizes=7"], "is not a setting"),
    ],
)
def test_judges_that_cannot_judge_are_refused_before_the_work(
    settings: list[str], message: str, tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *tiny_run, *settings]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "tiny" / "plan.csv").exists()


def test_judges_with_other_classes_may_judge_hidden_units(tiny_run: list[str]) -> None:
    hidden = ["layers.exclude=[classifier]", "judges.timm.arguments={num_classes: 7}"]
    assert main(["plan", *tiny_run, *JUDGED, *hidden]) == 0


def test_judges_are_a_list_of_networks() -> None:
    request = compose(["judges=[efficientnet_lite1, efficientnet_lite2]", "judges.efficientnet_lite2.weights=null"])
    assert list(request.config.judges) == ["efficientnet_lite1", "efficientnet_lite2"]
    assert request.config.judges["efficientnet_lite2"].weights is None
    assert compose([]).config.judges == {} and "judges" not in compose([]).tree
    with pytest.raises(AtlasError, match="there is no network 'efficientnet_lit'"):
        compose(["judges=[efficientnet_lit]"])
