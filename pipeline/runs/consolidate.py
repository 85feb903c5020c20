"""Consolidation: atlas.h5 and failures.csv from the finished results of a run."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipeline.core import hashing
from pipeline.core.errors import AtlasError
from pipeline.engine.base import Failure
from pipeline.examples.channel_stats import standard_deviation
from pipeline.examples.results import DatasetPassResult
from pipeline.layers.circuits.search import find_circuits
from pipeline.layers.dataflow import find_dataflow
from pipeline.layers.finding import Layer
from pipeline.layers.pixel_kernels import pixel_kernels
from pipeline.models.loading import load_model
from pipeline.planning.folder import result_settings
from pipeline.planning.plan import Plan
from pipeline.planning.request import Request
from pipeline.runs.artifacts import Artifacts
from pipeline.runs.dataset_pass import columns_by_layer
from pipeline.runs.judging import Judgements
from pipeline.runs.localized_arrays import WithMoreImages
from pipeline.store import writer
from pipeline.store.reader import SCHEMA_VERSION

log = logging.getLogger(__name__)

# Unreadable images that are named in the log; failures.csv lists all.
MAX_NAMED = 20

# Stage, what failed, reason, and detail: a row of failures.csv.
FailureRow = tuple[str, str, str, str]


def consolidate(
    request: Request, plan: Plan, artifacts: Artifacts, set_aside: Sequence[Failure], judgements: Judgements
) -> int:
    """Write failures.csv, and atlas.h5 unless it already holds these results; return the number of failures.

    Args:
        request: The configuration.
        plan: The plan.
        artifacts: Finished results in the run folder.
        set_aside: Tasks that failed.
        judgements: What the judges of the run say.

    Raises:
        AtlasError: If no dataset image could be read.
        Damaged: With the first shard that cannot be read completely.
    """
    folder, dataset_pass = artifacts.folder, artifacts.dataset_pass
    if dataset_pass.swept_ranges and not dataset_pass.complete:
        log.warning("The dataset pass is not complete: atlas.h5 has no dataset examples until it is")
    atlases = artifacts.activation_atlas
    if atlases.layers and not atlases.complete:
        log.warning("The activation atlas is not complete: atlas.h5 has none until `atlas run` has made its images")
    if artifacts.facets.layers and not artifacts.facets.complete:
        log.warning("The facets are not complete: atlas.h5 has none until `atlas run` has made their images")
    unreadable = dataset_pass.sweep.failed if dataset_pass.complete else ()
    _report_unreadable(unreadable, plan)
    failures = _failure_rows(plan, artifacts, set_aside, unreadable)
    folder.write_failures(failures)
    identity = _identity(request, plan, artifacts, failures, judgements)
    if writer.read_identity(folder.atlas) != identity:
        content = _content(request, plan, artifacts, identity, len(failures))
        content = dataclasses.replace(content, judgements=judgements)
        parts = {(row.layer.name, row.preset): found for row, found in artifacts.visualizations.items()}
        writer.consolidate(folder.atlas, content, parts)
    return len(failures)


def _failure_rows(
    plan: Plan, artifacts: Artifacts, set_aside: Sequence[Failure], unreadable: Sequence[tuple[int, str]]
) -> list[FailureRow]:
    rows = [failure_row(failure) for failure in set_aside]
    images = plan.setup.dataset.images
    rows += [("examples", images[i].path, reason, "") for i, reason in unreadable]
    for row in plan.rows:
        for channel, variant in artifacts.failed(row):
            what = f"{row.layer.name}:{channel} {row.preset} variant {variant}"
            reason = artifacts.reason(row, channel, variant) or "the objective did not rise in any attempt"
            rows.append(("render", what, reason, ""))
    return rows


def failure_row(failure: Failure) -> FailureRow:
    """Return the row of failures.csv of a task that was set aside."""
    return failure.task.stage, failure.task.name, failure.reason, failure.detail


def _identity(
    request: Request, plan: Plan, artifacts: Artifacts, failures: Sequence[FailureRow], judgements: Judgements
) -> str:
    """Return the digest of everything that atlas.h5 would contain, whichever shards it comes from."""
    judged = {"judges": [[*key, one.judge, one.digest] for key, found in judgements.items() for one in found]}
    digests = [
        [row.layer.name, row.preset, found[0].attributes["digest"]]
        for row, found in artifacts.visualizations.items()
        if found
    ]
    restarts = sorted(
        {
            str(shard.attributes["restart"])
            for found in artifacts.visualizations.values()
            for shard in found
            if "restart" in shard.attributes
        }
    )
    channels = [[row.layer.name, row.channels, sorted(artifacts.channels(row))] for row in plan.rows]
    complete = artifacts.dataset_pass.complete
    return hashing.digest_of(
        {
            "settings": result_settings(request.tree),
            "channels": channels,
            "visualizations": digests,
            "dataset pass": artifacts.dataset_pass.identity if complete else "",
            "failures": [failure[:3] for failure in failures],
            "versions": writer.versions(),
            "schema": SCHEMA_VERSION,
            **(judged if judgements else {}),
            **({"restarts": restarts} if restarts else {}),
            **(
                {"activation atlas": artifacts.activation_atlas.identity} if artifacts.activation_atlas.complete else {}
            ),
            **({"effects": artifacts.effects.identity} if artifacts.effects.complete else {}),
            **({"facets": artifacts.facets.identity} if artifacts.facets.complete else {}),
        }
    )


def _content(request: Request, plan: Plan, artifacts: Artifacts, identity: str, failures: int) -> writer.Content:
    """Return everything but the visualizations that atlas.h5 contains."""
    config = request.config
    result = artifacts.dataset_pass.result if artifacts.dataset_pass.complete else None
    effects = artifacts.effects if result is not None and artifacts.effects.complete else None
    if result is not None and effects is not None and effects.relevance_ranges:
        localizations = artifacts.dataset_pass.localizations
        result = dataclasses.replace(result, localizations=WithMoreImages(localizations, effects.more_images))
    network = load_model(config.model).to("cpu")
    layers = [layer for layer, _ in plan.layers]
    deviations = channel_deviations(layers, result) if result else None
    inputs, outputs = find_circuits(network, plan.layers, deviations)
    return writer.Content(
        identity=identity,
        run=config.run.name,
        model=config.model.name,
        weights=plan.setup.weights,
        config_yaml=request.text,
        labels=plan.labels,
        input_size=plan.recipe.size,
        layers=plan.layers,
        photos=plan.setup.dataset.images if result else (),
        dataset_fingerprint=plan.dataset_fingerprint,
        examples=result,
        inputs=inputs,
        outputs=outputs,
        failures=failures,
        unrendered={one.layer.name: one.reason for one in plan.unrendered},
        visualized={
            row.layer.name: row.channels
            for row in plan.rows
            if row.preset == config.render.name and set(row.channels) < set(plan.channels[row.layer.name])
        },
        kernels={
            layer.name: kernels
            for layer, channels in plan.layers
            if (kernels := pixel_kernels(network, layer, channels)) is not None
        },
        depths=[depth.name for depth in plan.setup.depths],
        network_layers=plan.network_layers,
        dataflow=find_dataflow(network, plan.network_layers),
        dataset_pass=artifacts.dataset_pass.digest if result else "",
        displays={row.preset: config.render.name for row in plan.rows if row.display},
        effects=effects.result if effects is not None else None,
        # Its samples are rows of the dataset, which an atlas has with its dataset pass.
        activation_atlases=artifacts.activation_atlas.results if result and artifacts.activation_atlas.complete else {},
        facets=artifacts.facets.results if result and artifacts.facets.complete else {},
    )


def channel_deviations(layers: Sequence[Layer], result: DatasetPassResult) -> dict[str, np.ndarray]:
    """Return the standard deviation of every channel over the dataset, (C,), by the names of all layers of a pass."""
    deviation = standard_deviation(result.first_pass.tally, result.ranges).astype(np.float32)
    return columns_by_layer(layers, deviation)


def _report_unreadable(unreadable: Sequence[tuple[int, str]], plan: Plan) -> None:
    """Log which dataset images could not be read, with the number of each kind of error.

    Raises:
        AtlasError: If none could be read.
    """
    images = plan.setup.dataset.images
    for index, reason in unreadable[:MAX_NAMED]:
        log.warning("skipped %r: %s", images[index].path, reason)
    if unreadable:
        kinds = Counter(reason.partition(":")[0] for _, reason in unreadable)
        counts = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        log.warning(
            "%d of %d images could not be read (%s); failures.csv lists them", len(unreadable), len(images), counts
        )
    if len(unreadable) == len(images):
        raise AtlasError("None of the dataset images could be read: check data.root.")
