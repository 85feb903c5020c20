"""Path similarity: the formula, the baselines, and networks whose units can be reached in two ways."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.images import metrics
from pipeline.images.path_similarity import NaturalPaths, PathSimilarity, path_similarity
from pipeline.layers.finding import capture, enumerate_layers
from pipeline.layers.path_depths import depths_before, spatial_means
from pipeline.models.config import Preprocessing
from pipeline.models.loading import Model, prepare_module, weights_digest


def photographs(images: int, channels: int, examples: int, units: int) -> tuple[NaturalPaths, torch.Generator]:
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(images, channels, generator=generator) * torch.logspace(-2, 2, channels) + 3
    rows = torch.stack([torch.randperm(images, generator=generator)[:examples] for _ in range(units)])
    sample = torch.arange(0, images, 2)
    return NaturalPaths(means, rows, sample, torch.arange(images) // 3), generator


@pytest.mark.parametrize("is_own_layer", [False, True])
def test_path_similarity_is_the_formula_written_out(is_own_layer: bool) -> None:
    paths, generator = photographs(40, 12, 4, 5)
    paths.examples[1, 2:] = -1  # a unit with two examples
    pictures = paths.means[:10].reshape(5, 2, 12) * torch.rand(5, 2, 12, generator=generator)
    own = torch.tensor([0, 3, 3, 11, 7])
    found = path_similarity(pictures, paths, own if is_own_layer else None)
    means, sample = paths.means.double().numpy(), paths.sample.numpy()
    mean, sd = means[sample].mean(0), means[sample].std(0, ddof=1)

    def cosine(a: np.ndarray, b: np.ndarray, unit: int) -> float:
        kept = np.arange(12) != (int(own[unit]) if is_own_layer else -1)
        x, y = ((v[kept] - mean[kept]) / sd[kept] for v in (a, b))
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    for unit in range(5):
        best = [n for n in paths.examples[unit].tolist() if n >= 0]
        for v in range(2):
            expected = np.mean([cosine(pictures[unit, v].double().numpy(), means[n], unit) for n in best])
            assert float(found.value[unit, v, 0]) == pytest.approx(expected, abs=1e-5)
        pairs = [cosine(means[a], means[b], unit) for a in best for b in best if a != b]
        assert float(found.natural[unit, 0]) == pytest.approx(np.mean(pairs), abs=1e-5)
        # An example is not compared with images of its own source, such as itself.
        random = [cosine(means[a], means[b], unit) for a in best for b in sample.tolist() if a // 3 != b // 3]
        assert float(found.random[unit, 0]) == pytest.approx(np.mean(random), abs=1e-5)


def test_the_own_channel_does_not_count() -> None:
    """Images that share nothing but the channel that they were chosen by."""
    generator = torch.Generator().manual_seed(2)
    means = torch.randn(300, 40, generator=generator)
    examples = torch.arange(16).view(4, 4)
    means[:16, 7] = 30.0
    pictures = torch.randn(4, 50, 40, generator=generator)
    pictures[..., 7] = 90.0
    paths = NaturalPaths(means, examples, torch.arange(300), torch.arange(300))
    fooled = path_similarity(pictures, paths)
    found = path_similarity(pictures, paths, torch.full((4,), 7))
    assert fooled.value.median() > 0.2 and fooled.natural.median() > 0.2
    assert abs(float(found.value.mean())) < 0.05 and abs(float(found.natural.mean())) < 0.1


def test_channels_that_do_not_vary_and_missing_images_are_passed_over() -> None:
    paths, _ = photographs(30, 8, 4, 3)
    paths.means[:, 2] = 5.0  # as of a dead channel
    paths.examples[1] = -1
    pictures = paths.means[paths.examples[:, :1].clamp(min=0)].clone()
    pictures[..., 2] = 1e4
    pictures[2] = torch.nan
    found = path_similarity(pictures, paths)
    assert found.value[0].isfinite().all() and found.natural[0].isfinite().all()
    assert found.value[1].isnan().all() and found.natural[1].isnan().all() and found.random[1].isnan().all()
    assert found.value[2].isnan().all() and found.natural[2].isfinite().all()
    alone = NaturalPaths(paths.means, paths.examples, paths.sample[:1], paths.sources)
    assert path_similarity(pictures, alone).value.isnan().all()


def test_the_ratio_is_of_means_over_depths_and_needs_a_baseline() -> None:
    nan = torch.nan
    value = torch.tensor([[[0.2, 0.0]], [[0.1, 0.3]], [[0.1, 0.1]], [[nan, 0.3]]])
    natural = torch.tensor([[0.01, 0.39], [0.35, 0.35], [-0.1, -0.1], [0.4, 0.5]])
    random = torch.tensor([[0.0, 0.0], [0.4, 0.3], [-0.5, -0.5], [0.0, 0.1]])
    # Of unrelated images, pairs have a deviation of 0.1, so that the mean of the 6 pairs of 4 examples has 0.04.
    cosines = torch.tensor([-0.1, 0.1]).repeat(4, 4, 50)[..., None].expand(-1, -1, -1, 2)
    similarity = PathSimilarity(value, natural, random, cosines)
    assert similarity.error().tolist() == pytest.approx([0.1 / 6**0.5] * 4, rel=0.01)
    found = similarity.averages()
    # (0.2 + 0.0) ÷ (0.01 + 0.39): the mean of the single ratios, 20 and 0, would be decided by a baseline near zero.
    assert float(found.ratio[0, 0]) == pytest.approx(0.5)
    assert found.ratio[1:3].isnan().all()  # no more alike than random images; less alike than unrelated ones
    assert float(found.ratio[3, 0]) == pytest.approx(0.6)  # of the depths that are known
    assert float(found.natural[0]) == pytest.approx(0.2) and float(found.random[1]) == pytest.approx(0.35)
    assert float(found.value[1, 0]) == pytest.approx(0.2)
    # The same baseline within two errors of the random one would give a ratio of 0.1 ÷ 0.07 that means nothing.
    faint = PathSimilarity(value[:1], natural[:1] / 3, random[:1], cosines[:1])
    assert faint.averages().ratio.isnan().all() and faint.averages().value.isfinite().all()


class TwoPaths(nn.Module):
    """A late layer that two halves of the early channels drive in the same way: A by photographs, B by nothing else."""

    def __init__(self, patches: Tensor, readout: Tensor) -> None:
        super().__init__()
        self.early = nn.Conv2d(3, len(patches), 4, stride=4, bias=False)
        self.relu = nn.ReLU()
        self.late = nn.Conv2d(len(patches), len(readout), 1, bias=False)
        with torch.no_grad():
            self.early.weight.copy_(patches.view(-1, 3, 4, 4))
            self.late.weight.copy_(torch.cat([readout, 3 * readout], 1)[..., None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.late(self.relu(self.early(x))).mean((2, 3))


def measured(model: Model, images: Tensor) -> dict[str, Tensor]:
    """Spatial means of `early` and maxima of `late`."""
    layers = [layer for layer in enumerate_layers(model) if layer.name in ("early", "late")]
    with torch.no_grad(), capture(model, layers) as forward:
        maps = forward(images)
        return {"early": spatial_means(maps["early"]), "late": maps["late"].flatten(2).amax(2)}


def test_a_fooling_circuit_has_a_high_transfer_and_another_path() -> None:
    """As Geirhos et al. 2023 build one: a picture that reaches the unit by a circuit that photographs never use."""
    generator = torch.Generator().manual_seed(0)
    features, units, images = 20, 12, 200
    patches, _ = torch.linalg.qr(torch.randn(48, 2 * features, generator=generator))
    patches, readout = patches.T, torch.rand(units, features, generator=generator) ** 8
    model = Model(prepare_module(TwoPaths(patches, readout)), "two paths",
                  Preprocessing((16, 16), 16, (0.0,) * 3, (1.0,) * 3), weights_digest(nn.Linear(1, 1)), ())  # fmt: skip

    def tiled(amounts: Tensor) -> Tensor:
        return (amounts @ patches).view(-1, 3, 4, 4).repeat(1, 1, 4, 4)

    content = torch.rand(images, features, generator=generator) ** 6
    pattern = 0.01 * torch.rand(images, features, generator=generator)
    seen = measured(model, tiled(torch.cat([content, pattern], 1)))
    examples = seen["late"].topk(8, 0).indices.T  # (units, 8)
    other = torch.rand(units, features, generator=generator) ** 6
    wanted = content[examples].mean(1)
    fooling = torch.cat([other, 2 * wanted], 1)
    natural = torch.cat([wanted, 0.005 * torch.ones(units, features)], 1)
    pictures = {name: measured(model, tiled(amounts)) for name, amounts in (("fooling", fooling), ("natural", natural))}
    channels, sample = torch.arange(units), torch.arange(images)
    paths = NaturalPaths(seen["early"][:, :features], examples, sample, sample)
    everything = NaturalPaths(seen["early"], examples, sample, sample)
    ratio, transfer = {}, {}
    for name, picture in pictures.items():
        found = path_similarity(picture["early"][:, None, :features], paths).averages()
        ratio[name] = float(found.ratio.nanmedian())
        transfer[name] = float(
            metrics.transfer(picture["late"][:, None], channels, seen["late"][examples], seen["late"]).value.median()
        )
    assert transfer["fooling"] > 0.8 and transfer["natural"] > 0.8  # the layer itself shows nothing
    assert -0.3 < ratio["fooling"] < 0.2 and ratio["natural"] > 0.9, ratio
    # With the channels of the other circuit the picture is further away still.
    fooled = path_similarity(pictures["fooling"]["early"][:, None], everything).averages()
    assert float(fooled.ratio.nanmedian()) < 0.25
    layers = {layer.name: layer for layer in enumerate_layers(model)}
    assert depths_before(layers["late"], (layers["early"],)) == (layers["early"],)
    assert depths_before(layers["relu"], (layers["early"],)) == ()  # a copy of its channels
