"""Maintenance of a run: verify its files, repair damaged ones, and compact finished shards.

Nothing here deletes finished work. A damaged file is renamed after all intact visualizations in it were copied to a
shard of their own, and shards are deleted only after every pixel of them was found in atlas.h5.
"""

import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.acceleration.precision import PRECISIONS, ieee
from pipeline.core import atomic_io
from pipeline.core.errors import AtlasError, first_line
from pipeline.data.datasets import Dataset
from pipeline.data.readers.base import DatasetImage
from pipeline.engine.tasks import Setup, device_kind, render_digest
from pipeline.engine.worker import Worker
from pipeline.layers.finding import capture
from pipeline.models.config import ModelConfig
from pipeline.models.loading import load_model
from pipeline.planning.cost_model import PlanRow
from pipeline.planning.folder import RunFolder
from pipeline.planning.plan import Plan
from pipeline.runs import best_examples
from pipeline.runs.artifacts import put_aside
from pipeline.runs.dataset_pass import (
    DatasetPass,
    devices_of,
    gaps,
    merged,
    ranges_digest,
    shard_path,
    unreadable_images,
    without_overlap,
)
from pipeline.store import hdf5, shards, writer
from pipeline.store.reader import open_atlas, structural_faults
from pipeline.store.shards import DamagedShardError, Shard
from pipeline.visualization.evaluation import RESTARTED, SILENT, target_view
from pipeline.visualization.initial_images import InitialImage, load_target_image
from pipeline.visualization.objectives import Activations

log = logging.getLogger(__name__)

# (where, what): a problem that was found, or a repair that was done.
Finding = tuple[str, str]

# Largest difference between a stored visualization and its second rendering, in levels of 255, if both were made in
# IEEE float32 on CPUs: rounding differs with machine and batch.
TOLERANCE = 1

# Largest difference between the stored activation of a visualization and the one recomputed from the stored image in
# float32, relative to the stored activation or to the median of its layer, whichever is larger. Folded normalization,
# other batches and other machines change it by rounding alone, which is below a thousandth; other code does not.
ACTIVATION_TOLERANCE = 0.01

# In any other precision, on a GPU (where kernels depend on the size of the batch, and add in any order), and on another
# kind of device, one differing last bit soon becomes a level or more: the root mean square difference may be this share
# of the visualization's contrast (standard deviation). Another seed gives more than the full contrast.
ROOT_MEAN_SQUARE_TOLERANCE = 0.5

# Arrays of a shard that are read image by image, the images first: their chunks can be damaged one by one.
STACKS = ("images", "mask")

# The bins of single images in a shard of the dataset pass: (images, channels) uint8, too many for memory at once.
CODES = "codes/bin"


def verify(folder: RunFolder, plan: Plan | None = None, sample: int = 0) -> list[Finding]:
    """Check whether a run is complete and undamaged.

    Reads atlas.h5 and all shards completely, compares every visualization with its digest and the content with
    plan.csv.

    Args:
        folder: The run.
        plan: The plan of the run; needed only with `sample`.
        sample: Number of visualizations to render again. They are drawn by the seed of the run; the activation of the
            stored image is recomputed, too.

    Returns:
        (where, what) of each problem; empty if there is none.

    Raises:
        AtlasError: If the run has no finished work.
    """
    problems: list[Finding] = []
    if folder.atlas.is_file():
        problems += writer.verify(folder.atlas, folder.planned_channels())
        if not (problems and structural_faults(folder.atlas)):  # only what this program wrote has digests to compare
            problems += [(part.group_path.strip("/"), what) for part, what in _damaged_parts(folder.atlas)]
    elif next(folder.shards.rglob("*.h5"), None) is None:
        raise AtlasError(f"{folder} has no finished work yet; start it with `atlas run`.")
    else:
        problems.append((folder.atlas.name, "does not exist; `atlas run` writes it from the shards"))
    try:
        folder.read_config()
    except AtlasError as error:
        problems.append((folder.config.name, str(error)))
    for path in sorted(folder.shards.rglob("*.h5")):
        shard = shards.read(path)
        where = str(path.relative_to(folder.path))
        if shard is None or shard.damage():
            problems.append((where, "is damaged; `atlas repair` keeps its intact parts, `atlas run` makes the others"))
        elif unread := unreadable_images(shard):
            kinds = Counter(reason.partition(":")[0] for _, reason in unread)
            log.info("%s: %d images could not be read: %s", where, len(unread), ", ".join(map(_counted, kinds.items())))
    for path in sorted(folder.path.rglob("*.damaged*")):
        log.info("%s was set aside, and no command reads it", path.relative_to(folder.path))
    if not problems and plan is not None and sample:
        problems += _render_again(folder.atlas, plan, sample)
    return problems


def _counted(item: tuple[str, int]) -> str:
    return f"{item[0]} {item[1]}"


def recorded_dataset(atlas: Path) -> tuple[Dataset, str] | None:
    """Return the dataset that an atlas was made from, without its files, and its fingerprint; None if it has none."""
    if writer.read_identity(atlas) is None:
        return None
    with open_atlas(atlas) as opened:
        table, fingerprint = opened.dataset(), str(opened.attributes.get("dataset_fingerprint", ""))
    if not fingerprint or table.empty:
        return None
    rows = zip(table["path"].tolist(), table["label"].tolist(), table["source"].tolist(), strict=True)
    return Dataset(tuple(DatasetImage(*row) for row in rows), {"": str(atlas.parent)}), fingerprint


def check_network(folder: RunFolder, config: ModelConfig) -> list[Finding]:
    """Check that `config` still gives the network that the atlas was computed from.

    Returns:
        One problem if the configuration gives another network than the atlas has; none if it gives the same network, or
        if there is no atlas.

    Raises:
        AtlasError: If the network can't be loaded.
    """
    if writer.read_identity(folder.atlas) is None:
        return []
    with open_atlas(folder.atlas) as atlas:
        atlas_weights = str(atlas.attributes["weights_sha256"])
    if load_model(config).digest == atlas_weights:
        return []
    return [
        (
            "network",
            "its weights or its code differ from those that the atlas was computed from: restore them, or compute "
            "the affected results again with `atlas run`",
        )
    ]


def _damaged_parts(atlas: Path) -> list[tuple[Shard, str]]:
    """Return the parts of an atlas that hold a visualization without its digest, each with a description."""
    damaged = []
    for part in writer.render_groups(atlas).values():
        try:
            intact, total = len(_intact_images(part)), int((part.get("status")["status"] != "missing").sum())
        except DamagedShardError as error:
            damaged.append((part, first_line(error)))
            continue
        except (TypeError, ValueError, IndexError, AttributeError) as error:  # not written by this program
            damaged.append((part, f"is not as docs/store.md describes it: {first_line(error)}"))
            continue
        if intact < total:
            what = (
                f"{total - intact} of {total} visualizations do not have their digests; `atlas repair` keeps the others"
            )
            damaged.append((part, what))
    return damaged


def _intact_images(shard: Shard) -> list[tuple[int, int]]:
    """Return (row, variant) of the visualizations that can be read with their masks and have their digest."""
    intact = []
    small = shard.get("status", "images_sha256")
    with shard.opened() as opened:
        stacks = [hdf5.dataset(opened, name) for name in STACKS if name in opened]
        for row, variant in np.argwhere(small["status"] != "missing").tolist():
            try:
                image, *_ = (stack[row, variant] for stack in stacks)
            except OSError:
                continue
            digest = hdf5.image_digests(image[None, None])[0, 0]
            if np.array_equal(digest, small["images_sha256"][row, variant]):
                intact.append((row, variant))
    return intact


def _render_again(atlas: Path, plan: Plan, sample: int) -> list[Finding]:
    """Render `sample` visualizations of an undamaged atlas again and compare them with the stored ones."""
    parts = writer.render_groups(atlas)
    found = {row: part for row in plan.rows if (part := _part_of(row, parts, plan.setup)) is not None}
    units = [
        (row, channel, variant)
        for row in found
        for channel in row.channels
        for variant in range(plan.config.preset(row.preset).variants)
    ]
    drawn = np.random.default_rng(plan.config.run.seed).permutation(len(units))[:sample]
    workers = {name: Worker(_with_precision(plan.setup, name)) for name in PRECISIONS}
    problems: list[Finding] = []
    for row, channel, variant in (units[i] for i in sorted(drawn)):
        part = found[row]
        small = part.get("channels", "activation", "status")
        index = small["channels"].tolist().index(channel)
        with part.opened() as opened:
            stored = hdf5.dataset(opened, "images")[index, variant]
        preset = plan.config.preset(row.preset)
        restarted = small["status"][index, variant] == RESTARTED
        with open_atlas(atlas) as opened_atlas:
            if restarted:
                initial = best_examples.best_example_images(opened_atlas, row.layer.name, [channel])
            else:
                initial = best_examples.initial_images_of(opened_atlas, preset, row.layer.name, [channel])
            mean = best_examples.layer_mean_of(opened_atlas, preset, row.layer.name)
        activation = _recompute_activation(workers["float32"], row, (channel, variant), mean, stored)
        unit = f"{row.layer.name}:{channel}"
        problems += _compare_activation(unit, activation, small["activation"], (index, variant))
        # An atlas part lists several precisions if its workers differed: one of them rendered this visualization.
        candidates = [(workers[name], is_reproducible(part, name, plan.setup)) for name in writer.precisions(part)]
        problems += _compare_image(candidates, row, (channel, variant), (initial, mean), stored)
    return problems


def _part_of(row: PlanRow, parts: Mapping[tuple[str, str], Shard], setup: Setup) -> Shard | None:
    """Return the part of an atlas with the visualizations of a row, whatever they were made on; None without."""
    recorded = {
        pair
        for (layer, _), part in parts.items()
        if layer == row.layer.name
        for pair in itertools.product(
            _kinds(part), str(part.attributes.get("requested_precision", "float32")).split() or ["float32"]
        )
    }
    for device, precision in [(setup.device, setup.precision), *sorted(recorded)]:
        made_on = dataclasses.replace(setup, device=device, precision=precision)
        digest = render_digest(made_on, row.layer, row.canvas, row.preset)
        if (row.layer.name, digest) in parts:
            return parts[row.layer.name, digest]
    return None


def _kinds(part: Shard) -> list[str]:
    """Return the kinds of devices that visualizations were made on; those of former versions were made on CPUs."""
    return str(part.attributes.get("device", "")).split() or ["cpu"]


def is_reproducible(part: Shard, precision: str, setup: Setup) -> bool:
    """Return whether a second rendering differs by rounding alone: if both are in IEEE float32 on a CPU.

    Args:
        part: Part of an atlas with the visualization.
        precision: Precision of its steps.
        setup: The setup of the worker that renders it again.
    """
    return precision == "float32" and _kinds(part) == ["cpu"] and device_kind(setup.device) == "cpu"


def _compare_image(
    workers: Sequence[tuple[Worker, bool]],
    row: PlanRow,
    unit: tuple[int, int],
    dataset_results: tuple[tuple[InitialImage, ...], tuple[float, ...]],
    stored: np.ndarray,
) -> list[Finding]:
    """Render the (channel, variant) `unit` on each worker until one agrees with the stored image (H, W, C) uint8.

    With each worker is whether its rendering must be equal to the stored one up to rounding. `dataset_results` are the
    initial images and the means of the layer that the unit needs.
    """
    channel, variant = unit
    largest: list[int] = []
    for worker, equal in workers:
        preset = worker.setup.config.preset_for(row.preset, row.layer)
        again = worker.pictures(row.layer.name, [channel], row.canvas, preset, *dataset_results)[variant]
        difference = again.image.astype(float) - stored
        largest.append(int(np.abs(difference).max()))
        log.info("%s:%d rendered again: largest difference %d levels", row.layer.name, channel, largest[-1])
        if largest[-1] <= TOLERANCE:
            return []
        root_mean_square = np.sqrt((difference**2).mean())
        if not equal and root_mean_square <= ROOT_MEAN_SQUARE_TOLERANCE * stored.std():
            return []
    return [
        (
            f"{row.layer.name}:{channel}",
            f"rendered again, it differs by {min(largest)} levels of 255 from the stored visualization",
        )
    ]


@ieee()
def _recompute_activation(
    worker: Worker, row: PlanRow, unit: tuple[int, int], mean: Sequence[float], image: np.ndarray
) -> float:
    """Return the objective on a stored image (H, W, C) uint8 of a (channel, variant), by the unmodified network.

    `mean` are the means of the layer's channels, where the objective compares with them.
    """
    preset = worker.setup.config.preset_for(row.preset, row.layer)
    layers = {row.layer.name: row.layer} | worker.setup.others_of(preset)
    model = worker.model
    device = model.device
    batch = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad(), capture(model, list(layers.values())) as forward:
        maps = {name: activations.float() for name, activations in forward(batch).items()}
        channels, variants = (torch.tensor([number], device=device) for number in unit)
        compared = torch.tensor(mean, device=device)[None, :, None, None] if mean else None
        photograph = load_target_image(preset, row.canvas, model.preprocessing)
        if photograph is not None:
            compared = forward(target_view(photograph, row.canvas).to(device))[row.layer.name].float()
        activations = Activations(maps[row.layer.name], channels, variants, preset.variants, maps, compared)
        return float(preset.objective.value(activations))


def _compare_activation(unit: str, recomputed: float, stored: np.ndarray, at: tuple[int, int]) -> list[Finding]:
    """Compare a recomputed activation with the one at (row, variant) `at` of the stored ones (C', V) of its layer."""
    expected = float(stored[at])
    finite = stored[np.isfinite(stored)]
    scale = float(np.median(np.abs(finite))) if finite.size else 0.0
    log.info("%s has an activation of %.5g, stored is %.5g", unit, recomputed, expected)
    absolute = ACTIVATION_TOLERANCE * scale
    if np.isclose(recomputed, expected, rtol=ACTIVATION_TOLERANCE, atol=absolute, equal_nan=True):
        return []
    what = f"the network's activation on the stored image is {recomputed:.5g}, but the stored one is {expected:.5g}"
    return [(unit, what)]


def _with_precision(setup: Setup, precision: str) -> Setup:
    """Return the setup of a worker whose optimization steps use `precision`, or float32 if its device lacks TF32."""
    lacking = precision == "tf32" and device_kind(setup.device) != "cuda"
    return dataclasses.replace(setup, precision="float32" if lacking else precision)


def rescue(shard: Shard, folder: RunFolder) -> int:
    """Copy the intact visualizations of a damaged file into new shards, and set the file aside.

    Args:
        shard: The damaged shard, or an atlas: then all visualizations that no shard holds are copied.
        folder: The run that gets the new shards.

    Returns:
        The number of copied visualizations.
    """
    if not shard.group_path:
        count = copy_visualizations(shard, folder)
    else:
        count = sum(copy_visualizations(part, folder) for part in writer.render_groups(shard.path).values())
    aside = put_aside(shard.path)
    log.warning("%s: %d intact visualizations kept, the file set aside as %s", shard.path, count, aside.name)
    return count


def copy_visualizations(shard: Shard, folder: RunFolder, channels: Collection[int] | None = None) -> int:
    """Copy intact visualizations that no other shard of `folder` holds into a new shard, with all their attributes.

    A channel is copied only if all of its variants are intact.

    Args:
        shard: A shard or a part of an atlas, also of another run.
        folder: The run that gets the new shard.
        channels: Channels to copy; all if None.

    Returns:
        The number of copied visualizations.
    """
    # A shard of the dataset pass can't be used in part.
    if "layer" not in shard.attributes or (not shard.group_path and shard.structural_fault()):
        return 0
    try:
        names = _names(shard)
        arrays = shard.get("channels", *(name for name in names if name not in ("channels", *STACKS)))
        intact = set(_intact_images(shard))
    except DamagedShardError:
        return 0
    target = folder.shards / "render" / shards.safe_name(str(shard.attributes["layer"]))
    digest = str(shard.attributes["digest"])
    present = {
        int(channel)
        for other in shards.find(target, digest)
        if other.path != shard.path
        for channel in other.get("channels")["channels"]
    }
    variants = arrays["status"].shape[1]
    rows = [
        row
        for row, channel in enumerate(arrays["channels"].tolist())
        if channel not in present
        and (channels is None or channel in channels)
        and all((row, variant) in intact for variant in range(variants))
    ]
    if not rows:
        return 0
    with shard.opened() as opened:
        stacks = {name: np.stack([hdf5.dataset(opened, name)[row] for row in rows]) for name in STACKS if name in names}
    content = {name: array[rows] for name, array in arrays.items() if name != "images_sha256"}
    numbers = content["channels"].tolist()
    unique = str(shard.attributes.get("restart", digest)) if not shard.group_path else digest
    name = f"{numbers[0]}-{numbers[-1]}-{len(rows)}-copied-{unique[:12]}.h5"
    # Every attribute but the position among the presets of an atlas.
    attributes = {key: value for key, value in shard.attributes.items() if key != "order"}
    shards.write(target / name, attributes, content | stacks)
    return len(rows) * variants


def _names(shard: Shard) -> list[str]:
    """Return the arrays of a shard; a group of an atlas also has the group `judges`, which is no part of it."""
    with shard.opened() as opened:
        return [name for name in hdf5.member_names(opened) if name != "judges"]


def set_aside_unreadable_atlas(folder: RunFolder) -> None:
    """Rename an atlas.h5 that can't be opened or is of an unknown version, so that no smaller one overwrites it."""
    if not folder.atlas.is_file():
        return
    try:
        open_atlas(folder.atlas).close()
        reason = "" if writer.read_identity(folder.atlas) is not None else "it is not complete"
    except AtlasError as error:
        reason = str(error)
    if reason:
        log.warning("atlas.h5 was set aside as %s: %s", put_aside(folder.atlas).name, reason)


def set_aside_unreadable_shards(folder: RunFolder) -> None:
    """Rename shards that can't be opened: their work is done again, and `verify` finds nothing more to tell."""
    for path in sorted(folder.shards.rglob("*.h5")):
        if shards.is_damaged(path):
            log.warning("%s is damaged and was set aside as %s", path, put_aside(path).name)


def set_aside_outdated_pass(plan: Plan, folder: RunFolder) -> None:
    """Rename the parts of a dataset pass that lack images which may be readable now, and what depends on them."""
    dataset_pass = DatasetPass(plan, folder.shards)
    outdated = dataset_pass.paths_of_outdated()
    if outdated:
        log.warning("%d parts of the dataset pass lack images that are read again now", len(dataset_pass.outdated))
    for path in outdated:
        put_aside(path)


def repair(folder: RunFolder) -> list[Finding]:
    """Set damaged files aside after copying their intact visualizations.

    Returns:
        (where, what was done) for each damaged file.
    """
    done: list[Finding] = []
    atomic_io.remove_temporary_files(folder.path)
    for path in sorted(folder.shards.rglob("*.h5")):
        shard = shards.read(path)
        if shard is None:
            put_aside(path)
            done.append((str(path.relative_to(folder.path)), "can't be read; set aside"))
        elif shard.damage():
            count = rescue(shard, folder)
            done.append((str(path.relative_to(folder.path)), f"set aside; {count} intact visualizations kept"))
    if folder.atlas.is_file():
        set_aside_unreadable_atlas(folder)
        if not folder.atlas.is_file():
            done.append((folder.atlas.name, "can't be read; set aside"))
        elif _is_damaged(folder.atlas):
            count = rescue(Shard(folder.atlas, {}, "/"), folder)
            done.append((folder.atlas.name, f"set aside; {count} visualizations that no shard holds were kept"))
    return done


def _is_damaged(atlas: Path) -> bool:
    """Return whether a part of an atlas can't be read, or does not have its digest."""
    if any("can't be" in what for _, what in writer.verify(atlas, {})):
        return True
    # An atlas of another structure was not written by this program, and has nothing that could be copied.
    return not structural_faults(atlas) and bool(_damaged_parts(atlas))


@dataclasses.dataclass(frozen=True)
class Compacted:
    """Result of `compact`.

    Attributes:
        removed_shards: Number of deleted shards.
        bytes: Their size.
        remaining_shards: Number of shards that remain.
    """

    removed_shards: int
    bytes: int
    remaining_shards: int


def compact(folder: RunFolder) -> Compacted:
    """Delete shards whose visualizations are all in atlas.h5, and merge the shards of the dataset pass into one.

    Shards of other settings, which are not in atlas.h5, remain. Neither the network nor the dataset is read.

    Raises:
        AtlasError: If there is no atlas.h5, or if `verify` finds a problem.
    """
    if not folder.atlas.is_file():
        raise AtlasError(f"{folder} has no atlas.h5 yet; `atlas run` writes it.")
    problems = verify(folder)
    if problems:
        where, what = problems[0]
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise AtlasError(f"Not compacted: {where} {what}{more}")
    removable = [shard.path for shard in merge_pass_shards(folder)]
    removable += _shards_in_atlas(folder)
    size = sum(path.stat().st_size for path in removable)
    for path in removable:
        path.unlink()
    folder.note_removed(removable)
    for subfolder in sorted((path for path in folder.shards.rglob("*") if path.is_dir()), reverse=True):
        if not any(subfolder.iterdir()):
            subfolder.rmdir()
    return Compacted(len(removable), size, sum(1 for _ in folder.shards.rglob("*.h5")))


def _shards_in_atlas(folder: RunFolder) -> list[Path]:
    """Return the rendered shards whose every visualization atlas.h5 holds, by digest."""
    parts = writer.render_groups(folder.atlas)
    names = ("channels", "images_sha256", "status", "reason")
    in_atlas = {key: part.get(*names) for key, part in parts.items()}
    paths = []
    for path in sorted((folder.shards / "render").rglob("*.h5")):
        shard = shards.read(path)
        if shard is None:
            continue
        small = shard.get(*names)
        part = in_atlas.get((str(shard.attributes["layer"]), str(shard.attributes["digest"])))
        if part is None:
            continue
        complete = (part["status"] != "missing").all(1)
        atlas_row = {int(channel): row for row, channel in enumerate(part["channels"]) if complete[row]}
        if all(
            channel in atlas_row and _holds_variants(small, row, part, atlas_row[channel])
            for row, channel in enumerate(small["channels"].tolist())
        ):
            paths.append(path)
    return paths


def _holds_variants(small: Mapping[str, np.ndarray], row: int, part: Mapping[str, np.ndarray], atlas_row: int) -> bool:
    """Return whether a row of an atlas has all images of a row of a shard, or restarted ones for silent ones."""
    same = (small["images_sha256"][row] == part["images_sha256"][atlas_row]).all(-1)
    silent = (small["status"][row] == "failed") & (small["reason"][row] == SILENT)
    return bool((same | silent & (part["status"][atlas_row] == RESTARTED)).all())


def merge_pass_shards(folder: RunFolder) -> list[Shard]:
    """Write one shard with the content of all shards of the dataset pass that atlas.h5 has the results of.

    Returns:
        The shards that the new one replaces; none if the pass is incomplete or is one shard already, or if atlas.h5 is
        of a version that does not name its pass.

    Raises:
        AtlasError: If the new shard does not hold what was written to it.
    """
    with open_atlas(folder.atlas) as atlas:
        digest = str(atlas.attributes.get("dataset_pass", ""))
        sources = atlas.dataset()["source"].to_numpy(np.int32)
    histogram_ranges = shards.read(shard_path(folder.shards, "ranges", "ranges", ranges_digest(digest)))
    if not digest or histogram_ranges is None:
        return []
    content = str(histogram_ranges.attributes["content"])
    parts = shards.find(folder.shards / "examples", digest)
    ranges = without_overlap(piece for piece in parts if piece.attributes.get("ranges") == content)
    pieces = list(ranges.values())
    if gaps(ranges, len(sources)) or len(pieces) < 2:
        return []
    k = pieces[0].get("tops/max")["tops/max"].shape[1]
    arrays = merged(pieces, k, sources if len(np.unique(sources)) < len(sources) else None).arrays()
    # The pieces cover rising ranges of images, so that their indices rise from piece to piece.
    arrays["codes/index"] = np.concatenate([piece.get("codes/index")["codes/index"] for piece in pieces])
    path = shard_path(folder.shards, "examples", f"0-{len(sources)}", digest)
    attributes = {"digest": digest, "start": 0, "end": len(sources), "ranges": content}
    if devices_of(pieces):
        attributes["device"] = devices_of(pieces)
    _write_merged(path, attributes, arrays, pieces)
    if not _holds(path, arrays, pieces):
        path.unlink()
        raise AtlasError("The dataset pass could not be written again as one shard; nothing was deleted.")
    return pieces


def _write_merged(
    path: Path, attributes: Mapping[str, Any], arrays: Mapping[str, np.ndarray], pieces: Sequence[Shard]
) -> None:
    """Write `arrays` and, one piece at a time, the bins of single images: 32,768 × 22,008 of them are 721 MB."""
    with hdf5.create_file(path) as file:
        for name, array in arrays.items():
            if name != CODES:
                hdf5.write_array(file, name, array)
        shape = (len(arrays["codes/index"]), arrays[CODES].shape[1])
        if shape[0]:
            bins = file.create_dataset(CODES, shape, np.uint8, chunks=True, compression="gzip", fletcher32=True)
            start = 0
            for piece in pieces:
                rows = piece.get(CODES)[CODES]
                bins[start : start + len(rows)] = rows
                start += len(rows)
        else:
            hdf5.write_array(file, CODES, arrays[CODES])
        for key, value in attributes.items():
            file.attrs[key] = value
        file.attrs["shard_version"] = shards.SHARD_VERSION
        file.attrs["complete"] = True


def _holds(path: Path, arrays: Mapping[str, np.ndarray], pieces: Sequence[Shard]) -> bool:
    """Return whether the shard at `path` holds `arrays` and the bins of all pieces."""
    merged = shards.read(path)
    assert merged is not None
    small = {name: array for name, array in arrays.items() if name != CODES}
    stored = merged.arrays(but=(CODES,))
    if stored.keys() != small.keys():
        return False
    if any(not np.array_equal(stored[k], v, equal_nan=v.dtype.kind == "f") for k, v in small.items()):
        return False
    with merged.opened() as opened:
        bins, start = hdf5.dataset(opened, CODES), 0
        for piece in pieces:
            rows = piece.get(CODES)[CODES]
            if not np.array_equal(bins[start : start + len(rows)], rows):
                return False
            start += len(rows)
        return bins.shape[0] == start
