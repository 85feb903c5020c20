"""Check of the setting `judges` before any work: do the networks load, and do they have the same classes?

And the estimate of their time.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter

import torch

from pipeline.core import hashing
from pipeline.core.errors import AtlasError
from pipeline.judges.judge import Judge, load_judge
from pipeline.judges.judgement import Kind
from pipeline.models.config import ModelConfig
from pipeline.models.loading import Model
from pipeline.planning.cost_model import MIN_MEASUREMENTS, TIME_LIMIT, ZERO_SPAN, Span
from pipeline.visualization.objectives import Direction
from pipeline.visualization.preset import Preset

# Images of a timed forward pass: on a GPU as many as judges look at at once.
TIMED_BATCH, TIMED_GPU_BATCH = 2, 16


@dataclasses.dataclass(frozen=True)
class PlannedJudge:
    """A judge of a plan, without its network, which is loaded again when it has something to judge.

    Attributes:
        name: Its key in the setting `judges`.
        config: The network.
        weights: sha256 of its weights.
        digest: Digest of everything that determines what it says about an image.
        load: Estimated seconds to load it; zero if it was not timed.
        forward: Estimated seconds of one image of its input size; zero if it was not timed.
    """

    name: str
    config: ModelConfig
    weights: str
    digest: str
    load: Span = ZERO_SPAN
    forward: Span = ZERO_SPAN

    def timed(self, device: str) -> "PlannedJudge":
        """Return the judge with the estimates of its time, from a few forward passes on a device."""
        began = perf_counter()
        judge = load_judge(self.name, self.config)
        judge = dataclasses.replace(judge, model=judge.model.to(device))
        load, size = perf_counter() - began, judge.model.preprocessing.size
        batch = TIMED_BATCH if device == "cpu" else TIMED_GPU_BATCH
        images = torch.rand(batch, judge.model.preprocessing.channels, *size)
        seconds: list[float] = []
        # The first pass is a warm-up. The results are on the CPU, so that a pass is complete when it returns.
        while len(seconds) < 2 or (len(seconds) <= MIN_MEASUREMENTS and sum(seconds[1:]) < TIME_LIMIT):
            began = perf_counter()
            if judge.labels:
                judge.class_logits(images)
            else:
                judge.features(images, size)
            seconds.append(perf_counter() - began)
        forward = Span.from_measurements(seconds[1:]) * (1 / batch)
        return dataclasses.replace(self, load=Span.exact(load), forward=forward)

    def span(self, images: float) -> Span:
        """Return the seconds to load the judge and to show it so many images of its input size; zero for no image."""
        return self.load + self.forward * images if images else ZERO_SPAN


def judged_as(preset: Preset, is_class_layer: bool) -> Kind | None:
    """Return which measure of judges applies to the visualizations of a layer by a preset, or None.

    None applies to images of several units, and to minimized classes: to be the last of all classes is not to be
    recognized.

    Args:
        preset: The preset as it is for the layer.
        is_class_layer: Whether the channels of the layer are the classes of the network.
    """
    objective = preset.objective
    if objective.per_layer or objective.units or isinstance(objective, Direction):
        return None
    if is_class_layer:
        return None if preset.negative else "class"
    return "unit"


def with_folder(judges: Mapping[str, ModelConfig], folder: Path) -> dict[str, ModelConfig]:
    """Return the settings of judges with the folder that their relative paths start from."""
    return {name: dataclasses.replace(config, folder=config.folder or str(folder)) for name, config in judges.items()}


def check_judges(
    judges: Mapping[str, ModelConfig], model: Model, class_layers: Sequence[str]
) -> tuple[PlannedJudge, ...]:
    """Load every judge and check that it can judge the visualizations of a run.

    Args:
        judges: The setting `judges`.
        model: The network of the run, with its class names.
        class_layers: Names of the chosen layers whose channels are these classes.

    Raises:
        AtlasError: If a judge cannot be loaded, needs other images than the network, or has other classes although
            class visualizations are to be judged.
    """
    planned = []
    for name, config in judges.items():
        judge = load_judge(name, config)
        channels, needed = model.preprocessing.channels, judge.model.preprocessing.channels
        if channels != needed:
            raise AtlasError(
                f"judges.{name} needs images of {needed} channels, and {model.name} is visualized in {channels}: "
                "choose a judge with the same input channels."
            )
        if class_layers and judge.labels != model.labels:
            raise AtlasError(_other_classes(judge, model, class_layers))
        planned.append(PlannedJudge(name, config, judge.model.digest, _digest(judge)))
    return tuple(planned)


def _other_classes(judge: Judge, model: Model, class_layers: Sequence[str]) -> str:
    """Return the message that the classes of a judge are not those of the network."""
    if not judge.labels:
        difference = "has no classifier with class names"
    elif len(judge.labels) != len(model.labels):
        difference = f"has {len(judge.labels)} classes, {model.name} has {len(model.labels)}"
    else:
        number, own, other = next(
            (i, a, b) for i, (a, b) in enumerate(zip(model.labels, judge.labels, strict=True)) if a != b
        )
        difference = f"calls class {number} {other!r}, {model.name} calls it {own!r}"
    return (
        f"judges.{judge.name} {difference}, so it cannot judge the class visualizations of {', '.join(class_layers)}. "
        f"Choose a judge with the same classes; or, if only the names differ, set judges.{judge.name}.labels to those "
        f"of the network; or leave the classes out (layers.exclude=[{','.join(class_layers)}]): hidden units need no "
        "common classes."
    )


def _digest(judge: Judge) -> str:
    """Return the digest of everything that determines what a judge says about an image."""
    layers = [judge.logits.tap if judge.logits else None, [layer.tap for layer in judge.layers]]
    return hashing.digest_of([judge.model.digest, dataclasses.asdict(judge.model.preprocessing), layers])
