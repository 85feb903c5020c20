"""The judge pass: other networks look at the finished visualizations (setting `judges`).

What a judge said about an image is stored under the sha256 of the image, in shards below `shards/judges/`, so that no
image is judged twice, whatever is added to the run.
"""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.core import hashing, interrupts
from pipeline.data import image_loading
from pipeline.judges import ridge
from pipeline.judges.judge import Judge, load_judge
from pipeline.judges.judgement import NUMBERS, Judgement, Kind
from pipeline.judges.recognition import recognize
from pipeline.judges.ridge import FeatureSpace, Match
from pipeline.planning.cost_model import PlanRow
from pipeline.planning.judging import PlannedJudge, judged_as
from pipeline.planning.plan import Plan
from pipeline.runs.artifacts import Artifacts
from pipeline.store import hdf5, shards
from pipeline.store.shards import DamagedShardError, Shard
from pipeline.store.writer import finished_rows

log = logging.getLogger(__name__)

# Raised when the same judge and images give other numbers than before.
JUDGES_VERSION = 1
# Images in one forward pass of a judge, and most images of one shard.
BATCH, SHARD = 16, 256

# Judgements by layer and preset, one for each judge.
Judgements = Mapping[tuple[str, str], Sequence[Judgement]]
# A visualization: its channel and the sha256 of its pixels.
Key = tuple[int, bytes]


def judge_visualizations(plan: Plan, artifacts: Artifacts) -> dict[tuple[str, str], list[Judgement]]:
    """Show the finished visualizations of a plan to its judges, as far as they have not been judged before.

    Raises:
        DamagedShardError: If a visualization cannot be read.
    """
    judgements: dict[tuple[str, str], list[Judgement]] = {}
    for planned in plan.judges:
        judge_pass = _JudgePass(planned, plan, artifacts)
        for row in plan.rows:
            judgement = judge_pass.judgement(row)
            if judgement is not None:
                judgements.setdefault((row.layer.name, row.preset), []).append(judgement)
    return judgements


@dataclasses.dataclass(frozen=True)
class _Picture:
    """A finished visualization: its unit, and its place in a shard."""

    channel: int
    digest: bytes
    shard: Shard
    row: int
    variant: int

    @property
    def key(self) -> Key:
        return self.channel, self.digest


class _JudgePass:
    """One judge and the visualizations of one plan.

    The network of the judge is loaded, and dataset images are read, only if something has not been judged before.
    """

    def __init__(self, planned: PlannedJudge, plan: Plan, artifacts: Artifacts) -> None:
        self._planned, self._plan, self._artifacts = planned, plan, artifacts
        self._folder = artifacts.folder.shards / "judges" / shards.safe_name(planned.name)
        self._dataset_pass = artifacts.dataset_pass

    def judgement(self, row: PlanRow) -> Judgement | None:
        """Return what the judge says about the visualizations of a row; None if it cannot say anything."""
        kind = self._kind(row)
        pictures = _pictures(self._artifacts.visualizations[row], row) if kind else []
        if kind is None or not pictures:
            return None
        digest, where = self._digest(row, kind), self._folder / shards.safe_name(row.layer.name)
        known = _known(where, digest, kind)
        new = [picture for picture in pictures if picture.key not in known]
        if new and kind == "unit" and self._space is None:
            return None
        for start in range(0, len(new), SHARD):
            part = new[start : start + SHARD]
            numbers = self._judge(row, kind, part)
            _write(where, {"digest": digest, "judge": self._planned.name, "kind": kind}, part, numbers)
            known |= {picture.key: numbers[i] for i, picture in enumerate(part)}
        variants = self._plan.config.preset(row.preset).variants
        channels = self._plan.channels[row.layer.name]
        table = np.full((len(channels), variants, len(NUMBERS[kind])), np.nan, np.float32)
        place = {channel: i for i, channel in enumerate(channels)}
        for picture in pictures:
            table[place[picture.channel], picture.variant] = known[picture.key]
        named = {name: table[..., i] for i, name in enumerate(NUMBERS[kind])}
        return Judgement(self._planned.name, self._planned.weights, kind, named, digest)

    def _kind(self, row: PlanRow) -> Kind | None:
        """Return which measure applies to the visualizations of a row, or None.

        Hidden units need the activations of the dataset pass.
        """
        if row.display:
            return None
        preset = self._plan.config.preset_for(row.preset, row.layer)
        kind = judged_as(preset, row.layer.name in self._plan.class_layers)
        return kind if kind != "unit" or (self._dataset_pass.complete and self._enough_images) else None

    @functools.cached_property
    def _enough_images(self) -> bool:
        """Whether the activations of enough dataset images are stored for regressions; a warning says if not."""
        count = min(self._plan.config.examples.subset, self._dataset_pass.total)
        if count < ridge.MIN_IMAGES:
            log.warning(
                "%s does not judge hidden units: activations of %d dataset images are stored, %d are needed "
                "(examples.subset)",
                self._planned.name,
                count,
                ridge.MIN_IMAGES,
            )
        return count >= ridge.MIN_IMAGES

    def _digest(self, row: PlanRow, kind: Kind) -> str:
        """Return the digest of everything besides the images that determines the numbers of a row."""
        fit = []
        if kind == "unit":
            negative = self._plan.config.preset(row.preset).negative
            fit = [self._dataset_pass.digest, self._plan.recipe.size, negative, ridge.MIN_CORRELATION]
            if not self._raises_activation(row):
                fit.append("correlation only")
        return hashing.digest_of(
            {
                "result": "judgement",
                "version": JUDGES_VERSION,
                "judge": self._planned.digest,
                "kind": kind,
                "layer": row.layer.tap,
                "fit": fit,
            }
        )

    def _judge(self, row: PlanRow, kind: Kind, pictures: Sequence[_Picture]) -> np.ndarray:
        """Return the numbers of visualizations, (n, numbers) float32."""
        log.info("%s looks at %d visualizations of %s", self._planned.name, len(pictures), row.layer.name)
        channels = np.array([picture.channel for picture in pictures])
        batches = (_images(pictures[start : start + BATCH]) for start in range(0, len(pictures), BATCH))
        if kind == "class":
            logits = np.concatenate([self._network.class_logits(images) for images in batches])
            return np.stack(recognize(logits, channels), 1)
        match, fitted = self._match(row.layer.name)
        units = np.searchsorted(fitted, channels)
        if not self._raises_activation(row):
            return _correlations(match, units)
        size = self._plan.recipe.size
        features = np.concatenate([self._network.features(images, size) for images in batches])
        negative = self._plan.config.preset(row.preset).negative
        return _unit_numbers(match, features, units, negative)

    def _raises_activation(self, row: PlanRow) -> bool:
        """Return whether the visualizations of a row raise the activation that a judge predicts."""
        return self._plan.config.preset_for(row.preset, row.layer).objective.raises_activation

    @functools.cached_property
    def _network(self) -> Judge:
        judge = load_judge(self._planned.name, self._planned.config)
        device = self._plan.setup.device
        if device.startswith("cuda") and torch.cuda.is_available():
            judge = dataclasses.replace(judge, model=judge.model.to(device))
        return judge

    @functools.cached_property
    def _space(self) -> FeatureSpace | None:
        """The features of the judge on dataset images; None if there are too few images."""
        dataset = self._plan.setup.dataset
        index, features = self._dataset_features()
        read = np.isfinite(features).all(1)
        # Crops of one source image are in one fold.
        folds = np.array(
            [hashing.hash64(dataset.images[i].source_path, "judges") % ridge.FOLDS for i in index.tolist()]
        )
        try:
            if not read.all():
                raise ValueError("images of the dataset pass cannot be read any more")
            return FeatureSpace(features, folds, self._network.feature_sizes)
        except ValueError as error:
            log.warning("%s does not judge hidden units: %s (examples.subset)", self._planned.name, error)
            return None

    def _dataset_features(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the images that activations are stored of, (n,), and the features of the judge on them, (n, p)."""
        parts = [self._planned.digest, self._dataset_pass.digest, dataclasses.asdict(self._plan.recipe)]
        digest = hashing.digest_of(["judge features", JUDGES_VERSION, parts])
        path = self._folder / f"features-{digest[:12]}.h5"
        shard = shards.read(path)
        if shard is not None and shard.attributes.get("digest") == digest:
            try:
                arrays = shard.arrays()
                return arrays["index"], arrays["features"]
            except DamagedShardError as error:
                log.warning("%s; it is made again", error)
        index = self._dataset_pass.sweep.responses_index
        log.info("%s looks at %d dataset images", self._planned.name, len(index))
        features = np.full((len(index), sum(self._network.feature_sizes)), np.nan, np.float32)
        place = {image: i for i, image in enumerate(index.tolist())}
        recipe = self._plan.recipe
        threads = self._plan.setup.threads
        loaded = image_loading.load_images(self._plan.setup.dataset, index.tolist(), recipe, threads)
        for items, levels in image_loading.batches(loaded, BATCH, []):
            interrupts.raise_if_interrupted()
            rows = [place[item.index] for item in items]
            features[rows] = self._network.features(torch.from_numpy(levels).float() / 255, recipe.size)
        shards.write(path, {"digest": digest}, {"index": index, "features": features})
        return index, features

    @functools.lru_cache(maxsize=1)  # noqa: B019 - the pass lives as long as its fits
    def _match(self, layer: str) -> tuple[Match, np.ndarray]:
        """Return the best matching directions of the visualized channels of a layer of the network, and the channels.

        A dictionary has many more latents than visualizations, and each channel has a fit of its own.
        """
        assert self._space is not None
        start = 0
        for other, _ in self._plan.layers:
            if other.name == layer:
                rows = (row for row in self._plan.rows if row.layer.name == layer)
                fitted = np.unique(np.concatenate([np.array(row.channels) for row in rows]))
                return self._space.match(self._dataset_pass.sweep.responses[:, start + fitted]), fitted
            start += other.channels
        raise KeyError(layer)


def _unit_numbers(match: Match, features: np.ndarray, units: np.ndarray, negative: bool) -> np.ndarray:
    """Return correlation, quantile and deviations of visualizations, (n, 3); of minimized units from the low end."""
    placement = match.place(features, units)
    quantile, deviations = placement.quantile, placement.deviations
    if negative:
        quantile, deviations = 1 - quantile, -deviations
    return np.stack([match.correlation[units], quantile, deviations], 1).astype(np.float32)


def _correlations(match: Match, units: np.ndarray) -> np.ndarray:
    """Return the numbers of visualizations that do not raise the activation, (n, 3): the correlation of the unit."""
    numbers = np.full((len(units), len(NUMBERS["unit"])), np.nan, np.float32)
    numbers[:, NUMBERS["unit"].index("correlation")] = match.correlation[units]
    return numbers


def _pictures(found: Sequence[Shard], row: PlanRow) -> list[_Picture]:
    """Return the finished visualizations of a row; the first shard with a channel provides it, as in an atlas."""
    pictures: list[_Picture] = []
    places = {channel: i for i, channel in enumerate(row.channels)}
    seen: set[int] = set()
    for shard in found:
        digests = shard.get("images_sha256")["images_sha256"]
        for i, place in finished_rows(shard, places):
            if place not in seen:
                seen.add(place)
                channel = row.channels[place]
                pictures += [_Picture(channel, d.tobytes(), shard, i, v) for v, d in enumerate(digests[i])]
    return pictures


def _images(pictures: Sequence[_Picture]) -> Tensor:
    """Return the images of visualizations, (B, C, H, W) in [0, 1].

    Raises:
        DamagedShardError: If an image cannot be read.
    """
    interrupts.raise_if_interrupted()
    images = []
    for picture in pictures:
        with picture.shard.opened() as opened:
            images.append(np.asarray(hdf5.dataset(opened, "images")[picture.row, picture.variant]))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def _known(where: Path, digest: str, kind: Kind) -> dict[Key, np.ndarray]:
    """Return the numbers of the images that were judged before; damaged shards count as absent."""
    known: dict[Key, np.ndarray] = {}
    for shard in shards.find(where, digest) if where.is_dir() else ():
        try:
            arrays = shard.get("channel", "image", *NUMBERS[kind])
        except DamagedShardError as error:
            log.warning("%s; its images are judged again", error)
            continue
        numbers = np.stack([arrays[name] for name in NUMBERS[kind]], 1)
        known |= dict(zip(_keys(arrays["channel"], arrays["image"]), numbers, strict=True))
    return known


def _keys(channels: np.ndarray, images: np.ndarray) -> Iterator[Key]:
    return ((int(channel), image.tobytes()) for channel, image in zip(channels, images, strict=True))


def _write(where: Path, attributes: Mapping[str, str], pictures: Sequence[_Picture], numbers: np.ndarray) -> None:
    """Write a shard with the numbers of visualizations; its name follows from the images."""
    arrays = {
        "channel": np.array([picture.channel for picture in pictures], np.int32),
        "image": np.stack([np.frombuffer(picture.digest, np.uint8) for picture in pictures]),
        **{name: numbers[:, i] for i, name in enumerate(NUMBERS[attributes["kind"]])},  # type: ignore[index]
    }
    name = hashing.digest_of([attributes["digest"], hashing.arrays_digest(arrays)])[:16]
    shards.write(where / f"{name}.h5", attributes, arrays)
