"""Former and present measures: made cases in which the former one is fooled, and a whole run."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.core.metric_specs import share
from pipeline.examples.channel_stats import HistogramRange, RunningSums, channel_statistics
from pipeline.examples.label_association import LabeledSources, associate_by_activations
from pipeline.images import metrics
from pipeline.layers.connectivity import find_connectivity
from pipeline.layers.finding import enumerate_layers
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, prepare_module

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "benches"))

import former_measures as former
import measures


def test_a_verdict_changes_if_it_is_reversed_or_withdrawn() -> None:
    nan = np.nan
    old, new = np.array([1, 0, 1, 0, 1, 0, nan, nan]), np.array([1, 0, 0, 1, nan, nan, 1, nan])
    assert measures.changed(old, new).tolist() == [False, False, True, True, True, False, False, False]
    values = measures.exceeds(np.array([[2.0], [0.5], [nan]]), 1.0)
    assert np.array_equal(values.verdict, [1, 0, nan], equal_nan=True)
    row = measures.compared(["a", "b", "c"], values, measures.exceeds(np.array([0.5, 0.25, 9.0]), 1))
    assert row["images"] == 2 and row["verdict changes"] == measures.Share(1, 2) and row["channels"] == "a"
    assert (row["former"], row["present"]) == (1.25, 0.375)
    sections = [measures.Section("one", "", [row, row]), measures.Section("none", "", [])]
    assert [str(r["verdict changes"]) for r in measures.summary(sections).rows] == ["2 of 4", "–"]


def test_only_some_of_the_changed_units_are_named() -> None:
    names = [f"late:{i}" for i in range(20)]
    assert measures.named(names, np.arange(20) < 2) == "late:0, late:1"
    assert measures.named(names, np.arange(20) < 9) == ", ".join(names[:8]) + " …"


def test_former_transfer_contains_the_channel_that_was_optimized() -> None:
    """An image and dataset examples that have nothing in common but the unit's own channel."""
    rng = np.random.default_rng(0)
    natural = rng.normal(size=(200, 60)).astype(np.float32)
    image, examples = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 1, 60), (1, 4, 60)))
    image[..., 0], examples[..., 0] = 30, 12
    old = former.transfer(image, examples, natural)
    now = metrics.transfer(*map(torch.from_numpy, (image, np.zeros(1, np.int64), examples, natural)))
    assert old.value.item() > 0.9 and old.value.item() > old.floor.item()
    assert abs(now.value.item()) < 0.25 and now.value.item() < now.floor.item()
    verdicts = [measures.exceeds(t.value.ravel(), t.floor).verdict for t in (old, now)]
    assert measures.changed(*verdicts).all()


def test_former_transfer_is_a_cosine_of_differences() -> None:
    natural = np.array([[0, 0, 0], [2, 2, 2]], np.float32)  # mean 1
    examples = np.array([[[3, 1, 1], [1, 3, 1], [np.nan] * 3]], np.float32)  # (2, 0, 0) and (0, 2, 0)
    found = former.transfer(np.array([[[4, 1, 1], [1, 1, 4]]], np.float32), examples, natural)
    assert found.value[0] == pytest.approx([np.sqrt(0.5), 0]) and found.ceiling.item() == pytest.approx(0)
    assert found.floor.item() == pytest.approx(0.9 * 2 / np.sqrt(6))  # 95 % of the way from −x to x


def test_former_activation_ratio_rewards_a_filled_map() -> None:
    """A texture of 2 everywhere against a photograph with an object of 4 in a sixteenth of its map."""
    texture, photograph = np.full(16, 2.0), np.where(np.arange(16) == 3, 4.0, 0.0)
    old = former.activation_ratio(texture.mean()[None, None], photograph.mean()[None], negative=False)
    now = share(texture.max()[None, None], photograph.max()[None, None], False)
    assert old.item() == 8 and now.item() == 0.5
    assert measures.changed(measures.exceeds(old, 1).verdict, measures.exceeds(now, 1).verdict).all()
    assert np.isnan(former.activation_ratio(np.ones((1, 1)), np.zeros(1), negative=False)).all()
    assert former.activation_ratio(np.full((1, 1), -3.0), np.full(1, -2.0), negative=True).item() == 1.5


def test_former_rank_is_decided_by_the_scale_of_a_channel() -> None:
    """Channel 0 is near 100 for every image; the image excites channel 1 by five deviations, channel 0 by none."""
    natural = np.random.default_rng(1).normal(size=(100, 4)).astype(np.float32)
    natural[:, 0] += 100
    image = natural.mean(0)[None, None] + np.array([0, 5, 0, 0], np.float32)
    assert former.rank(image, np.array([0])).item() == 1 and former.rank(image, np.array([1])).item() == 2
    margins = [metrics.margin(*map(torch.from_numpy, (image, np.array([c]), natural))).item() for c in (0, 1)]
    assert margins[0] < -4 and margins[1] > 4
    image[0, 0, 2] = np.nan
    assert former.rank(np.full_like(image, np.nan), np.array([0])).shape == (1, 1)
    assert np.isnan(former.rank(np.full_like(image, np.nan), np.array([0]))).all()


def test_former_saturation_misses_what_a_sigmoid_saturates() -> None:
    levels = np.full((2, 4, 4, 3), 128, np.uint8)
    levels[0, :2], levels[1, :2] = 252, 254  # 3/255 and 1/255 below white
    assert former.saturated(levels).tolist() == [0, 0.5]
    images = torch.from_numpy(levels).permute(0, 3, 1, 2).double() / 255
    assert metrics.saturation(images).tolist() == [0.5, 0.5]
    assert former.saturated(levels, metrics.SATURATION_MARGIN).tolist() == [0.5, 0.5]


def test_former_statistics_take_zero_for_a_threshold_everywhere() -> None:
    """Two linear channels, one around 0 and one around 5, as an arbitrary offset: activity is that of the offset."""
    maps = np.random.default_rng(2).normal(size=(50, 2, 9)).astype(np.float32) + np.array([[0], [5]], np.float32)
    peaks, lows, means = maps.max(2), maps.min(2), maps.mean(2)
    ranges = HistogramRange.from_sample(peaks, lows, means, [2])
    d = maps - ranges.centre.astype(np.float32)[:, None]
    reduced = np.stack([peaks, lows, d.mean(2), (d**2).mean(2), (maps > 0).mean(2)]).astype(np.float32)
    sums = RunningSums(ranges, [2])
    sums.add(torch.from_numpy(reduced))
    total = sums.total()
    old, now = former.zero_statistics(total, ranges), channel_statistics(total, ranges, np.zeros(2, bool))
    assert old["nonzero"] == pytest.approx([0.5, 1], abs=0.05) and old["fired"][1] == 1 and not old["inactive"].any()
    assert all(np.isnan(now[name]).all() for name in ("nonzero", "fired", "sparsity"))


def test_former_labels_find_some_in_noise() -> None:
    """Bins that have nothing to do with 40 labels of 10 images: the best of 40 looks good on the same images."""
    rng = np.random.default_rng(3)
    codes, labels = rng.integers(1, 255, (400, 30)).astype(np.uint8), np.repeat(np.arange(40), 10)
    low, high = np.zeros(30), np.ones(30)
    best, area = former.best_labels(codes, labels, low, high)
    sources = LabeledSources.group(labels, np.arange(400), rng.permutation(400).astype(np.uint64))
    now = associate_by_activations(codes, sources, low, high, rectified=True)
    assert (best >= 0).all() and np.median(area) > 0.65
    assert np.median(now.auroc) == pytest.approx(0.5, abs=0.06) and (now.best < 0).mean() > 0.7
    over, lift = former.over_represented(codes, labels)
    assert (over[:, 0] >= 0).any() and lift[over >= 0].min() > 1
    assert (now.over[:, 0] >= 0).sum() < (over[:, 0] >= 0).sum()


def test_former_labels_count_the_crops_of_one_image() -> None:
    """The four top images are crops of one dog; the other nineteen dogs are like everything else."""
    rng = np.random.default_rng(4)
    codes = rng.integers(1, 100, (400, 1)).astype(np.uint8)
    labels, images = np.repeat([0, 1], [24, 376]), np.concatenate([np.zeros(5, int), np.arange(1, 396)])
    codes[:4] = 250
    over, lift = former.over_represented(codes, labels)
    assert over[0, 0] == 0 and lift[0, 0] == pytest.approx(400 / 24)
    sources = LabeledSources.group(labels, images, rng.permutation(396)[images].astype(np.uint64))
    now = associate_by_activations(codes, sources, np.zeros(1), np.ones(1), rectified=True)
    assert now.over[0, 0] != 0


def test_former_labels_are_the_best_mean_and_its_area() -> None:
    codes = np.array([[10], [20], [30], [40]] * 10, np.uint8)
    best, area = former.best_labels(codes, np.tile([0, 0, 1, -1], 10), np.zeros(1), np.ones(1))
    assert best.tolist() == [1] and area.tolist() == [1]
    best, area = former.best_labels(codes, np.zeros(40, int), np.full(1, -2.0), np.full(1, -1.0))
    assert best.tolist() == [-1] and np.isnan(area).all()  # rectified, nothing is left


class Reversed(nn.Sequential):
    """A depthwise kernel that reverses signs, and a normalization that makes channel 1 ten times as large."""

    def __init__(self) -> None:
        first, middle = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, groups=3)
        norm, last = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            middle.weight.copy_(torch.tensor([-2.0, 1, 1]).reshape(3, 1, 1, 1) / 3 * torch.ones(3, 1, 3, 3))
            norm.weight.copy_(torch.tensor([1.0, 10, 1]))
            last.weight.copy_(torch.tensor([[4.0, 1, 2], [4, 1, 2]])[..., None, None])
        super().__init__(first, middle, norm, nn.ReLU(), last)


def test_former_connectivity_has_neither_normalizations_nor_signs() -> None:
    module = prepare_module(Reversed())
    model = Model(module, "made", Preprocessing((16, 16), 16, (0.5,) * 3, (0.25,) * 3), "0", ())
    layers = [layer for layer in enumerate_layers(model) if layer.name in ("0", "4")]
    (before, _), (now, _) = former.connectivity(model, layers), find_connectivity(model, layers)
    # Norms of the depthwise kernels are 2, 1 and 1, their sums −6, 3 and 3.
    assert before["4"].channel[0].tolist() == [0, 2, 1] and now["4"].channel[0].tolist() == [1, 0, 2]
    assert before["4"].norm[0] == pytest.approx([8, 2, 1]) and before["4"].sum[0] == pytest.approx([8, 2, 1])
    assert now["4"].sum[0] == pytest.approx([30, -24, 6], rel=1e-3)
    shared, opposite, first = measures.overlap(before["4"], now["4"])
    assert shared.tolist() == [3, 3] and opposite.tolist() == [1, 1] and first.all()
    again = find_connectivity(model, layers)[0]
    assert np.array_equal(again["4"].norm, now["4"].norm)  # the network itself is unchanged


@pytest.mark.long
def test_a_run_is_compared(tiny_run: list[str], tmp_path: Path) -> None:
    overrides = ["also=[negative]", "also.negative.steps=2", "also.negative.size=32", "judges=[]"]
    assert main(["run", *tiny_run, *overrides]) == 0
    folder = tmp_path / "tiny"
    text = measures.report(folder)
    for title in ("its floor", "its ceiling", "Activation ratio", "Rank", "Saturation", "against zero", "Connectivity"):
        assert any(line.startswith("## ") and title in line for line in text.splitlines())
    assert "| negative |" in text and "share a label" in text and measures.NO_SHARDS not in text
    assert "negative" not in measures.report(folder, ["distill"]).partition("## Rank")[0]
    with pytest.raises(AtlasError, match="distil"):
        measures.report(folder, ["distil"])
    with measures.pipeline.open_atlas(folder) as atlas:
        found = measures.read_pass(folder, atlas)
        assert found is not None
        for layer in atlas:
            stored = layer.measurements("negative")
            if "transfer" not in stored:
                continue
            natural = found.responses[:, found.columns[layer.name]]
            responses = layer.image_activations("negative")
            assert responses is not None
            arrays = responses.astype(np.float32), layer.channels.astype(np.int64), found.examples(layer, True), natural
            again = metrics.transfer(*map(torch.from_numpy, arrays))
            assert again.value.numpy() == pytest.approx(stored["transfer"], nan_ok=True)
    for path in (folder / "shards" / "examples").glob("*.h5"):
        path.unlink()
    assert measures.NO_SHARDS in measures.report(folder)
