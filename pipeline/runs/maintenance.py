"""Is a run whole, and what can be saved of one that is not: verify, repair, compact.

Nothing here deletes finished work: a damaged file is renamed once all whole pictures in it have a shard of their
own, and shards go only when atlas.h5 was seen to hold, to the last pixel, what they hold.
"""

import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch

from pipeline.core.errors import AtlasError, first_line
from pipeline.engine.tasks import Setup, render_digest
from pipeline.engine.worker import Worker
from pipeline.examples import sweep
from pipeline.examples.sweep import PassResult
from pipeline.layers.finding import capture
from pipeline.models.config import ModelConfig
from pipeline.models.loading import load
from pipeline.runs import best_examples
from pipeline.runs.artifacts import Artifacts, put_aside
from pipeline.runs.cost_model import PlanRow
from pipeline.runs.folder import RunFolder
from pipeline.runs.planner import Plan
from pipeline.store import shards, writer
from pipeline.store.reader import open_atlas
from pipeline.store.shards import Damaged, Shard
from pipeline.visualization.initial_images import InitialImage
from pipeline.visualization.objectives import Activations

log = logging.getLogger(__name__)

Wrong = tuple[str, str]

# How far a picture may be from its second rendering, in levels of 255: rounding differs with machine and batch.
TOLERANCE = 1

# How far the activation of a kept image may be from the number kept beside it, computed again by the network as it is,
# in float32: relative to that number or to the median of its layer, whichever is larger. Folded normalization, other
# batches and other machines differ by their rounding alone, which is below a thousandth; other code does not.
ACTIVATION_TOLERANCE = 0.01

# In bfloat16 a last bit that differs is soon a level or more: the difference may have this share of the picture's
# contrast. Another start gives more than its whole contrast.
ALIKE = 0.5


def verify(folder: RunFolder, made: Plan | None = None, sample: int = 0) -> list[Wrong]:
    """What is wrong with a run, as (where, what); empty if it is whole.

    Reads atlas.h5 and all shards to the last byte and holds every picture against its digest, the content against
    the plan, and renders `sample` pictures of `made` again, drawn by the run's seed; of the kept ones the activation is
    computed again, too.
    """
    wrong: list[Wrong] = []
    if folder.atlas.is_file():
        wrong += writer.verify(folder.atlas, folder.planned())
        wrong += [(part.inside.strip("/"), what) for part, what in _damaged_parts(folder.atlas)]
    elif next(folder.shards.rglob("*.h5"), None) is None:
        raise AtlasError(f"{folder.path} has no finished work yet; `atlas run` makes it.")
    else:
        wrong.append((folder.atlas.name, "is not there; `atlas run` writes it from the shards"))
    for path in sorted(folder.shards.rglob("*.h5")):
        shard = shards.read(path)
        if shard is None or shard.damage():
            where = str(path.relative_to(folder.path))
            wrong.append((where, "is damaged; `atlas repair` keeps what is whole of it, `atlas run` makes the rest"))
    for path in sorted(folder.path.rglob("*.damaged")):
        log.info("%s was set aside; delete it when you need it no more", path.relative_to(folder.path))
    if not wrong and made is not None and sample:
        wrong += _rendered_again(folder.atlas, made, sample)
    return wrong


def another_network(folder: RunFolder, config: ModelConfig) -> list[Wrong]:
    """Whether `config` gives another network now than the one that the atlas was made from; empty without an atlas.

    Raises `AtlasError` where it gives none at all.
    """
    if writer.identity(folder.atlas) is None:
        return []
    with open_atlas(folder.atlas) as atlas:
        made_from = str(atlas.attributes["weights_sha256"])
    if load(config).digest == made_from:
        return []
    return [
        (
            "network",
            "its weights or its code are not those that the atlas was made from: run `atlas run` again, which makes "
            "what they change, or bring them back",
        )
    ]


def _damaged_parts(atlas: Path) -> list[tuple[Shard, str]]:
    """Parts of an atlas with a picture that is not what its digest says."""
    found = []
    for part in writer.parts(atlas).values():
        try:
            whole, total = len(_whole(part)), int((part.get("status")["status"] != "missing").sum())
        except Damaged as error:
            found.append((part, first_line(error)))
            continue
        if whole < total:
            what = (
                f"{total - whole} of {total} pictures are not what their digests say; `atlas repair` keeps the others"
            )
            found.append((part, what))
    return found


def _whole(shard: Shard) -> list[tuple[int, int]]:
    """(row, variant) of a shard's pictures that can be read and have their digest."""
    found = []
    small = shard.get("status", "images_sha256")
    with shard.opened() as opened:
        pictures = shards.dataset(opened, "images")
        for i, v in np.argwhere(small["status"] != "missing").tolist():
            try:
                picture = pictures[i, v]
            except OSError:
                continue
            if np.array_equal(shards.picture_digests(picture[None, None])[0, 0], small["images_sha256"][i, v]):
                found.append((i, v))
    return found


def _rendered_again(atlas: Path, made: Plan, sample: int) -> list[Wrong]:
    """Render some pictures of a whole atlas once more and compare; of the kept ones, compute the activation again."""
    parts = writer.parts(atlas)
    digest = {row: render_digest(made.setup, row.layer, row.canvas, row.preset) for row in made.rows}
    preset = {row: made.config.preset(row.preset) for row in made.rows}
    rows = [row for row in made.rows if (row.layer.name, digest[row]) in parts]
    units = [(row, channel, v) for row in rows for channel in row.channels for v in range(preset[row].variants)]
    chosen = np.random.default_rng(made.config.run.seed).permutation(len(units))[:sample]
    workers = {name: Worker(_in_precision(made.setup, name)) for name in ("float32", "bfloat16")}
    wrong: list[Wrong] = []
    for row, channel, variant in (units[i] for i in sorted(chosen)):
        part = parts[row.layer.name, digest[row]]
        small = part.get("channels", "activation")
        at = small["channels"].tolist().index(channel)
        with part.opened() as opened:
            kept = shards.dataset(opened, "images")[at, variant]
        now = _activation(workers["float32"], row, channel, variant, kept)
        wrong += _apart(f"{row.layer.name}:{channel}", now, small["activation"], (at, variant))
        begins: tuple[InitialImage, ...] = ()
        if preset[row].needs_examples:
            with open_atlas(atlas) as opened_atlas:
                begins = best_examples.best(opened_atlas, row.layer.name, [channel])
        # Where workers differed, one of them has made it.
        apart: list[int] = []
        for name in writer.precisions(part):
            again = workers[name].pictures(row.layer.name, [channel], row.canvas, preset[row], begins)[variant]
            difference = again.image.astype(float) - kept
            apart.append(int(np.abs(difference).max()))
            log.info("%s:%d rendered again: %d levels apart at most", row.layer.name, channel, apart[-1])
            rough = name == "bfloat16" and np.sqrt((difference**2).mean()) <= ALIKE * kept.std()
            if rough or apart[-1] <= TOLERANCE:
                break
        else:
            told = f"rendered again, it is {min(apart)} levels of 255 from what is kept"
            wrong.append((f"{row.layer.name}:{channel}", told))
    return wrong


def _activation(worker: Worker, row: PlanRow, channel: int, variant: int, kept: np.ndarray) -> float:
    """The objective on a kept image (H, W, C), of 8 bits, by the network as it is: nothing folded, all in float32."""
    preset = worker.setup.config.preset(row.preset)
    layers = {row.layer.name: row.layer} | worker.setup.others_of(preset)
    model = worker.model
    device = next(model.module.parameters()).device
    image = torch.from_numpy(kept).to(device).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad(), capture(model, list(layers.values())) as forward:
        maps = {name: found.float() for name, found in forward(image).items()}
        channels, variants = (torch.tensor([number], device=device) for number in (channel, variant))
        responses = Activations(maps[row.layer.name], channels, variants, preset.variants, maps)
        return float(preset.objective.value(responses))


def _apart(unit: str, now: float, activations: np.ndarray, at: tuple[int, int]) -> list[Wrong]:
    """Whether a picture's activation, computed again, is another than the one kept of it among its layer's."""
    kept = float(activations[at])
    finite = activations[np.isfinite(activations)]
    scale = float(np.median(np.abs(finite))) if finite.size else 0.0
    log.info("%s has an activation of %.5g, kept as %.5g", unit, now, kept)
    if np.isclose(now, kept, rtol=ACTIVATION_TOLERANCE, atol=ACTIVATION_TOLERANCE * scale, equal_nan=True):
        return []
    return [(unit, f"the network's activation on the kept image is {now:.5g}, but {kept:.5g} is kept")]


def _in_precision(setup: Setup, precision: str) -> Setup:
    """The same setup for a worker that steps in `precision`."""
    engine = dataclasses.replace(setup.config.engine, precision=precision)
    return dataclasses.replace(setup, config=dataclasses.replace(setup.config, engine=engine))


def rescue(shard: Shard, folder: RunFolder) -> int:
    """Give all whole pictures of a damaged file shards of their own, and set the file aside; returns their number.

    For an atlas this means every picture in it that no shard has.
    """
    if not shard.inside:
        kept = copy_pictures(shard, folder)
    else:
        kept = sum(copy_pictures(part, folder) for part in writer.parts(shard.path).values())
    aside = put_aside(shard.path)
    log.warning("%s: %d whole pictures kept, the file set aside as %s", shard.path, kept, aside.name)
    return kept


def copy_pictures(shard: Shard, folder: RunFolder, wanted: Collection[int] | None = None) -> int:
    """Give whole pictures that no other shard of `folder` has a shard there; returns how many they are.

    `shard` may be a part of an atlas, also another run's; `wanted` are the channels to be copied, None for all.
    """
    if "layer" not in shard.attributes:  # a piece of the dataset pass is whole or not at all
        return 0
    try:
        arrays = shard.get("channels", *(n for n in _names(shard) if n not in ("channels", "images")))
        whole = set(_whole(shard))
    except Damaged:
        return 0
    where = folder.shards / "render" / shards.safe(str(shard.attributes["layer"]))
    digest = str(shard.attributes["digest"])
    have = {
        int(c)
        for other in shards.find(where, digest)
        if other.path != shard.path
        for c in other.get("channels")["channels"]
    }
    variants = arrays["status"].shape[1]
    rows = [
        i
        for i, channel in enumerate(arrays["channels"].tolist())
        if channel not in have
        and (wanted is None or channel in wanted)
        and all((i, v) in whole for v in range(variants))
    ]
    if not rows:
        return 0
    with shard.opened() as opened:
        images = np.stack([shards.dataset(opened, "images")[i] for i in rows])
    content = {name: array[rows] for name, array in arrays.items() if name != "images_sha256"}
    numbers = content["channels"].tolist()
    name = f"{numbers[0]}-{numbers[-1]}-{len(rows)}-copied-{digest[:12]}.h5"
    # All but the place that they have in an atlas.
    attributes = {key: value for key, value in shard.attributes.items() if key != "order"}
    shards.write(where / name, attributes, content | {"images": images})
    return len(rows) * variants


def _names(shard: Shard) -> list[str]:
    with shard.opened() as opened:
        return shards.names(opened)


def put_aside_unreadable(folder: RunFolder) -> None:
    """An atlas.h5 that can't even be opened is kept under another name, never overwritten by a poorer one."""
    if folder.atlas.is_file() and writer.identity(folder.atlas) is None:
        log.warning("atlas.h5 can't be read and was set aside as %s", put_aside(folder.atlas).name)


def repair(folder: RunFolder) -> list[Wrong]:
    """Set aside what is broken, after saving what is whole of it; (where, what was done)."""
    done: list[Wrong] = []
    shards.sweep(folder.path)
    for path in sorted(folder.shards.rglob("*.h5")):
        shard = shards.read(path)
        if shard is None:
            put_aside(path)
            done.append((str(path.relative_to(folder.path)), "can't be read; set aside"))
        elif shard.damage():
            kept = rescue(shard, folder)
            done.append((str(path.relative_to(folder.path)), f"set aside; {kept} whole pictures kept"))
    if folder.atlas.is_file():
        if writer.identity(folder.atlas) is None:
            put_aside_unreadable(folder)
            done.append((folder.atlas.name, "can't be read; set aside"))
        elif _damaged_parts(folder.atlas) or _torn(folder.atlas):
            kept = rescue(Shard(folder.atlas, {}, "/"), folder)
            done.append((folder.atlas.name, f"set aside; {kept} pictures that no shard had were kept"))
    return done


def _torn(atlas: Path) -> bool:
    return any("can't be" in what for _, what in writer.verify(atlas, {}))


@dataclasses.dataclass(frozen=True)
class Compacted:
    """How many shards went, and the bytes that they took."""

    removed: int
    bytes: int
    kept: int


def compact(folder: RunFolder, made: Plan) -> Compacted:
    """Delete shards whose every picture atlas.h5 holds, and melt the pieces of the dataset pass into one.

    Raises `AtlasError` unless atlas.h5 is whole. Shards of other settings, which it does not hold, stay.
    """
    if not folder.atlas.is_file():
        raise AtlasError(f"{folder.path} has no atlas.h5 yet; `atlas run` makes it.")
    wrong = verify(folder)
    if wrong:
        raise AtlasError(
            f"Not compacted: {wrong[0][0]} {wrong[0][1]}" + (f" (and {len(wrong) - 1} more)" if wrong[1:] else "")
        )
    removable = [shard.path for shard in _melted(folder, made)]
    parts = writer.parts(folder.atlas)
    digests = {key: part.get("channels", "images_sha256", "status") for key, part in parts.items()}
    for path in sorted((folder.shards / "render").rglob("*.h5")):
        shard = shards.read(path)
        if shard is None:
            continue
        own = shard.get("channels", "images_sha256")
        kept = digests.get((str(shard.attributes["layer"]), str(shard.attributes["digest"])))
        if kept is None:
            continue
        row = {int(c): i for i, c in enumerate(kept["channels"]) if (kept["status"][i] != "missing").all()}
        if all(
            int(c) in row and np.array_equal(own["images_sha256"][i], kept["images_sha256"][row[int(c)]])
            for i, c in enumerate(own["channels"])
        ):
            removable.append(path)
    size = sum(path.stat().st_size for path in removable)
    for path in removable:
        path.unlink()
    for empty in sorted((p for p in folder.shards.rglob("*") if p.is_dir()), reverse=True):
        if not any(empty.iterdir()):
            empty.rmdir()
    return Compacted(len(removable), size, sum(1 for _ in folder.shards.rglob("*.h5")))


def _melted(folder: RunFolder, made: Plan) -> list[Shard]:
    """Pieces of a complete dataset pass that one new shard has taken the place of."""
    survey = Artifacts(made, folder).survey
    pieces = list(survey.ranges.values())
    if not survey.covered or len(pieces) < 2:
        return []
    sweeps = (PassResult.from_arrays(piece.arrays()) for piece in pieces)
    arrays = sweep.merge(sweeps, made.config.examples.k, made.setup.dataset.sources).arrays()
    path = folder.shards / "examples" / f"0-{survey.total}-{survey.digest[:12]}.h5"
    attributes = {"digest": survey.digest, "start": 0, "end": survey.total, "ranges": survey.content}
    shards.write(path, attributes, arrays)
    whole = shards.read(path)
    assert whole is not None
    again = whole.arrays()
    if again.keys() != arrays.keys() or any(
        not np.array_equal(again[k], v, equal_nan=v.dtype.kind == "f") for k, v in arrays.items()
    ):
        path.unlink()
        raise AtlasError("The dataset pass could not be written again as one shard; nothing was deleted.")
    return pieces
