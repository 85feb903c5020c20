"""Path similarity: does a feature visualization travel through the network as natural images do?

At each of several layers, an image is described by the spatial means of all channels, as standard scores over random
dataset images. Compared are the visualization with the unit's best dataset examples, these with each other (the natural
baseline) and with random dataset images (the random baseline). A visualization that activates its unit along another
path than natural images is as dissimilar to them in the layers before as random images are, even if the unit's own
layer shows nothing.

Source: Geirhos, Zimmermann, Bilodeau, Brendel & Kim 2023, "Don't trust your eyes: on the (un)reliability of feature
visualizations" (arXiv 2306.04719), who compare with the same two baselines in every layer up to the unit. Here the
similarity is a cosine of standard scores of spatial means, which do not depend on positions in the image.
"""

import dataclasses

import torch
from torch import Tensor

from pipeline.core.metric_specs import MIN_DEVIATION

# The natural baseline must exceed the random one by so many standard errors of unrelated images.
ERRORS = 2.0


@dataclasses.dataclass(frozen=True)
class NaturalPaths:
    """Dataset images at one layer.

    Attributes:
        means: (m, C) spatial means of the C channels for m dataset images.
        examples: (G, k) rows of the best dataset examples of each of G units; −1 where there are fewer than k.
        sample: (r,) rows of the random images.
        sources: (m,) number of the source of each image; an image is not compared with one of its own source.
    """

    means: Tensor
    examples: Tensor
    sample: Tensor
    sources: Tensor


@dataclasses.dataclass(frozen=True)
class PathSimilarity:
    """Mean cosines at D depths, −1 … 1; NaN where images are missing.

    Attributes:
        value: (G, V, D) of the V visualizations of G units with the unit's best dataset examples.
        natural: (G, D) of these examples with each other.
        random: (G, D) of these examples with random dataset images.
        cosines: (G, k, r, D) what `random` is the mean of: of each of k examples with each of r random images.
    """

    value: Tensor
    natural: Tensor
    random: Tensor
    cosines: Tensor

    @classmethod
    def stacked(cls, depths: "list[PathSimilarity]") -> "PathSimilarity":
        """Join single depths in their order; at least one."""
        fields = dataclasses.fields(cls)
        return cls(*(torch.cat([getattr(depth, field.name) for depth in depths], -1) for field in fields))

    def error(self) -> Tensor:
        """Return the standard error of the mean of `natural` over depths for unrelated images, (G,).

        It is the deviation of the similarity of two images, over pairs of an example and a random image, ÷ √ of the
        number of pairs of examples.
        """
        pairs = self.cosines.nanmean(-1).flatten(1)
        known = pairs.isfinite()
        squares = (pairs - pairs.nanmean(1, keepdim=True)).square().nan_to_num().sum(1) / (known.sum(1) - 1)
        examples = self.cosines.isfinite().any(-1).any(-1).sum(1)
        return (squares / (examples * (examples - 1) / 2)).sqrt()

    def averages(self) -> "PathAverages":
        """Return the means over depths, and their ratio."""
        known = self.value.isfinite() & (self.natural + self.random).isfinite()[:, None]
        everywhere = (self.natural + self.random).isfinite()

        def mean(values: Tensor, counted: Tensor) -> Tensor:
            return values.where(counted, torch.tensor(0.0)).sum(-1) / counted.sum(-1)  # 0 ÷ 0 is NaN

        value = mean(self.value, known)
        # Of the same depths, should a visualization lack one.
        natural, random = (mean(part[:, None].expand_as(known), known) for part in (self.natural, self.random))
        least = random.clamp(min=0) + ERRORS * self.error()[:, None]
        ratio = torch.where(natural > least, value / natural, torch.nan)
        return PathAverages(ratio, value, mean(self.natural, everywhere), mean(self.random, everywhere))


@dataclasses.dataclass(frozen=True)
class PathAverages:
    """`PathSimilarity` as single numbers.

    Attributes:
        ratio: (G, V) mean of `value` ÷ mean of `natural`, both over the depths. 1: the visualization is as similar to
            natural images as these are to each other; 0: not at all. NaN where the natural baseline is not above the
            random one and 0 by `ERRORS` standard errors: the examples of such a unit have no common path to compare
            with, and the quotient would be noise. Means are taken before dividing for the same reason.
        value: (G, V) mean over the depths.
        natural: (G,) mean over the depths.
        random: (G,) mean over the depths.
    """

    ratio: Tensor
    value: Tensor
    natural: Tensor
    random: Tensor


def path_similarity(visualizations: Tensor, paths: NaturalPaths, own: Tensor | None = None) -> PathSimilarity:
    """Compare visualizations with dataset images at one layer.

    z = (spatial mean − its mean) ÷ its standard deviation, both over the random images. For the examples n₁ … n_k of a
    unit, its visualization v and random images r:

        value = mean of cos(z(v), z(nᵢ)) over i
        natural = mean of cos(z(nᵢ), z(nⱼ)) over i ≠ j
        random = mean of cos(z(nᵢ), z(r)) over i and r

    All three are cosines of two single images, so that they can be compared.

    Args:
        visualizations: (G, V, C) spatial means; NaN for a missing image.
        paths: The dataset images.
        own: (G,) the units' own channels if the layer is their own: they are left out, because the image was optimized
            for them and the examples were chosen by them. None for a layer before.

    Returns:
        One depth, D = 1. NaN everywhere for fewer than two random images.
    """
    mean, scale = _standard(paths.means[paths.sample])
    units, available = torch.arange(len(paths.examples)), paths.examples >= 0

    def directions(means: Tensor) -> Tensor:
        """Standard scores (G, n, C) of length 1, without the own channels."""
        scores = (means - mean) * scale
        if own is not None:
            scores[units, :, own] = 0.0
        return scores / scores.norm(dim=-1, keepdim=True)

    known = directions(paths.means[paths.examples.clamp(min=0)]).where(available[..., None], torch.tensor(torch.nan))
    value = (directions(visualizations) @ known.transpose(1, 2)).nanmean(-1)
    pairs = known @ known.transpose(1, 2)
    pairs.diagonal(dim1=1, dim2=2).fill_(torch.nan)
    # The own channel is 0 in `known`, so that only the lengths of the random images have to leave it out.
    random = (paths.means[paths.sample] - mean) * scale
    squares = random.square().sum(1).expand(len(units), -1)
    if own is not None:
        squares = squares - random[:, own].T.square()
    cosines = known @ random.T / squares.clamp(min=0).sqrt()[:, None]
    same = paths.sources[paths.examples.clamp(min=0)][..., None] == paths.sources[paths.sample]
    cosines = cosines.masked_fill(same, torch.nan)
    natural, unrelated = (part.flatten(1).nanmean(1)[:, None] for part in (pairs, cosines))
    return PathSimilarity(value[..., None], natural, unrelated, cosines[..., None])


def _standard(random: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and 1 ÷ standard deviation of channels over (r, C) random images; 0 for channels that do not vary."""
    if len(random) < 2:
        return random.new_zeros(random.shape[1]), random.new_full((random.shape[1],), torch.nan)
    mean, deviation = random.mean(0), random.std(0)
    # Relative to the own mean, too: what is stored with 11 bits does not tell such a channel from a constant.
    least = MIN_DEVIATION * torch.maximum(mean.abs(), deviation.median())
    varies = deviation > least.clamp(min=torch.finfo(deviation.dtype).tiny)
    return mean, torch.where(varies, 1 / deviation, 0.0)
