"""The verbs of the command line."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import compare
from pipeline.cli import names as naming
from pipeline.cli.overrides import Options
from pipeline.cli.tables import console, print_pairs, print_plan
from pipeline.cli.trust import untrusted_note
from pipeline.compare.build import build as build_comparison
from pipeline.compare.console import print_comparison
from pipeline.config.schema import Config, from_tree
from pipeline.core.atomic_io import atomic_path
from pipeline.core.config_files import ConfigFile, is_url, load_config_files, load_yaml
from pipeline.core.errors import AtlasError, nearest_names
from pipeline.core.formatting import clock
from pipeline.core.validation import build
from pipeline.data import datasets, image_loading, natural_spectrum
from pipeline.dictionaries import fitting
from pipeline.dictionaries.config import DictionaryConfig
from pipeline.engine.progress import report_lines
from pipeline.kernels.allocator import retain_freed_memory
from pipeline.layers.selection import list_layers
from pipeline.models.loading import load_model
from pipeline.planning import execution
from pipeline.planning.folder import RunFolder
from pipeline.planning.plan import Plan
from pipeline.planning.planner import make_plan
from pipeline.planning.preset_inputs import refuse_dataset_images
from pipeline.planning.request import Request
from pipeline.runs import maintenance, pages, runner
from pipeline.runs.activation_grid import MAX_CELLS, GridRequest, activation_grid
from pipeline.runs.runner import COMPLETE, SET_ASIDE
from pipeline.site.hosting.hosts import missing_addresses, prepare_for_host
from pipeline.site.hosting.serve import server
from pipeline.store.reader import check_structure, open_atlas
from pipeline.store.remote import local_root, split_url
from pipeline.store.shards import safe_name

# Side of the squares that `atlas spectrum` measures, in pixels.
SPECTRUM_SIDE = 128


def run(request: Request, _: Options) -> int:
    """Plan, dataset pass, visualizations, atlas.h5 and site: whatever of them is missing."""
    # The allocator is set as that of the workers, so that the timed steps are theirs; also below.
    retain_freed_memory()
    return runner.plan_and_run(request, show=print_plan)


def plan(request: Request, _: Options) -> int:
    """Print the table of layers and the estimated time."""
    retain_freed_memory()
    print_plan(runner.plan_run(request))
    runner.log.info("written to %s", request.folder.plan)
    return COMPLETE


def examples(request: Request, _: Options) -> int:
    """The dataset pass alone."""
    retain_freed_memory()
    return runner.plan_and_run(request, ("examples",))


def render(request: Request, _: Options) -> int:
    """The visualizations alone."""
    retain_freed_memory()
    return runner.plan_and_run(request, ("render",))


def site(request: Request, _: Options) -> int:
    """Build the site again from atlas.h5: only what changed."""
    folder = request.folder.existing()
    with folder.locked():
        check_structure(folder.path)
        # Only the command line can give this permission: the stored configuration may be a stranger's.
        trusted = request.config.site.own_image and request.config.run.trust
        pages.build_site(request, folder, _stored_config(folder) if trusted else None)
    return COMPLETE


def serve(request: Request, options: Options) -> int:
    """Show the site on this machine until Ctrl-C."""
    port = options.values.get("port", "8000")
    if not port.isdigit():
        raise AtlasError(f"port={port!r} must be a number.")
    with server(request.folder.existing("site").site, int(port)) as running:
        print(f"http://127.0.0.1:{running.server_port}/index.html (Ctrl-C stops it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            running.serve_forever()
    return COMPLETE


def publish(request: Request, options: Options) -> int:
    """Prepare the site for a host and print the command that publishes it."""
    folder = request.folder.existing("site", "atlas.h5")
    report, command = prepare_for_host(folder.site, options.host, request.config.site.title)
    advice = missing_addresses(folder.site, folder.atlas)
    print("\n".join([*report.lines(), *advice, "", "Ready. The command that publishes it:", "", f"  {command}"]))
    return COMPLETE


def status(request: Request, _: Options) -> int:
    """Print the progress of a run."""
    folder = request.folder.existing()
    state, planned = folder.read_status(), folder.planned_channels()
    print(f"{folder}: {len(planned)} layers, {sum(map(len, planned.values())):,} units planned")
    for name, stage in state.get("stages", {}).items():
        rate = f", {stage['per_second']} a second" if "per_second" in stage else ""
        print(f"  {name}: {stage['done']:,} of {stage['total']:,}, {stage['failed']} failed{rate}")
    if state.get("finished"):
        print(f"  complete since {state['updated']}, {state['failures']} failures")
    elif state:
        running, left = folder.is_running(), state.get("eta_seconds")
        workers = f", {state['workers']} workers" if running and "workers" in state else ""
        remaining = "" if left is None else f", about {clock(left)} left"
        print(f"  as of {state['updated']}{workers}{remaining}")
        if not running:
            print("  no command is running on this machine; `atlas run` continues")
    else:
        print("  not started; `atlas run` starts it")
    for line in report_lines(state["report"]) if "report" in state else ():
        print(f"  {line}")
    return COMPLETE


def verify(request: Request, _: Options) -> int:
    """Check the files of a run, and some visualizations by making them again."""
    folder = request.folder.existing("shards", "atlas.h5")
    sample = request.config.run.check
    # Only the command line can give this permission: the stored configuration may be a stranger's.
    trusted = sample > 0 and request.config.run.trust
    # The plan cannot be made again with another network, which may not have its layers.
    faults = maintenance.check_network(folder, _stored_config(folder).model) if trusted else []
    faults += maintenance.verify(folder, _stored_plan(folder) if trusted and not faults else None, sample)
    if sample and not trusted:
        with contextlib.suppress(AtlasError):  # a config.yaml that can't be read is one of the faults
            runner.log.info("%s", untrusted_note(folder.read_config()))
    if not faults:
        print(f"{folder}: intact")
        return COMPLETE
    print_pairs(faults, "what is wrong")
    return SET_ASIDE


def repair(request: Request, _: Options) -> int:
    """Set aside damaged files and keep their intact parts; `run` makes the rest again."""
    folder = request.folder.existing()
    with folder.locked():
        changes = maintenance.repair(folder)
    if not changes:
        print(f"{folder}: nothing is damaged")
        return COMPLETE
    print_pairs(changes, "what was done")
    print("`atlas run` makes what is missing now")
    return COMPLETE


def compact(request: Request, _: Options) -> int:
    """Delete the shards whose content atlas.h5 has."""
    folder = request.folder.existing()
    with folder.locked():
        result = maintenance.compact(folder)
    print(
        f"{folder}: {result.removed_shards} shards deleted, {result.bytes / 1e6:.1f} MB; {result.remaining_shards} kept"
    )
    return COMPLETE


def export(request: Request, options: Options) -> int:
    """Write the table of units to a file."""
    folder = request.folder.existing("atlas.h5")
    check_structure(folder.path)
    with open_atlas(folder.path) as atlas:
        units = atlas.units()
    kind = "csv" if "csv" in options.flags else "parquet"
    path = folder.path / f"units.{kind}"
    with atomic_path(path) as temporary:
        if kind == "parquet":
            units.to_parquet(temporary, index=False)
        else:
            units.to_csv(temporary, index=False)
    print(f"{path}: {len(units):,} rows, {len(units.columns)} columns")
    return COMPLETE


def compare_runs(request: Request, options: Options) -> int:
    """Write tables and a site that compare runs, to a folder of their own."""
    config, asked = request.config, options.compare
    names = [safe_name(Path(run.rstrip("/")).name.removesuffix(".h5")) for run in asked.runs]
    if asked.out and is_url(asked.out):
        raise AtlasError(f"out={asked.out} must be a folder on this machine.")
    out = Path(asked.out or config.root / "-".join(["compare", *names]))
    places = [_fetched(run, config) for run in asked.runs]
    with compare.open_runs(places, asked.presets, config.root) as opened:
        result = build_comparison(opened, out, config.site)
    print_comparison(result.comparison, console(160))
    size = f"{result.host.files:,} files, {result.host.bytes / 1e6:.1f} MB"
    tables = ["compare.csv", "summary.csv", *(["effects.csv"] if result.comparison.effects else [])]
    print(f"{out / 'index.html'}: {size}; {', '.join(tables)}")
    return COMPLETE


def spectrum(request: Request, options: Options) -> int:
    """Measure the amplitude spectrum of the centers of the preprocessed dataset images, and write it to a file."""
    out = options.values.get("out")
    if out is None:
        raise AtlasError("`atlas spectrum` needs a file to write: out=mine.npz.")
    recipe = load_model(request.config.model).preprocessing
    dataset = datasets.list_dataset(request.config.data, recipe.channels)
    side = min(*recipe.size, SPECTRUM_SIDE)
    top, left = ((length - side) // 2 for length in recipe.size)
    loaded = image_loading.load_images(dataset, range(len(dataset.images)), recipe)
    images = [image.array[:, top : top + side, left : left + side] for image in loaded if image.array is not None]
    measured = natural_spectrum.measure_spectrum(images)
    with atomic_path(Path(out)) as temporary:
        temporary.write_bytes(measured.content())
    print(f"{out}: {len(images):,} of {len(dataset.images):,} images, {side} x {side} pixels")
    return COMPLETE


def grid(request: Request, options: Options) -> int:
    """Make the activation grid of a photograph, as a PNG and an .npz."""
    values = options.values
    missing = [key for key in ("layer", "image") if key not in values]
    if missing:
        raise AtlasError(f"`atlas grid` needs {missing[0]}=…, as in atlas grid layer=blocks.3.0 image=photo.jpg.")
    number = values.get("cells", str(MAX_CELLS))
    if not number.isdigit():
        raise AtlasError(f"cells={number!r} must be a number.")
    out = Path(values.get("out", "grid.png"))
    if out.suffix.lower() != ".png":
        raise AtlasError(f"out={str(out)!r} must be a .png file; the arrays are written beside it as .npz.")
    photograph = ConfigFile(values["image"]).read("image")
    refuse_dataset_images(request.config.render)
    config = dataclasses.replace(request.config, render=load_config_files(request.config.render, "render"))
    model = load_model(config.model).to("cpu")
    candidates = list_layers(model, config.layers, config.model.aliases)
    layers = {layer.name: layer for layer in candidates}
    name = values["layer"]
    if name not in layers:
        raise AtlasError(f"{model.name} has no layer {name!r}. {nearest_names(name, layers)}")
    wanted = GridRequest(layers[name], photograph, int(number))
    made = activation_grid(model, config, candidates, wanted, model.to)
    arrays = made.save(out)
    rows, columns = wanted.shape
    print(f"{out}: {rows} x {columns} cells of {name}; {arrays}")
    return COMPLETE


def _scalar(text: str, key: str) -> Any:
    """Return the value of an option as YAML reads it, and 1e-3 as a number, which is text in YAML."""
    try:
        return int(text) if text.strip().lstrip("+-").isdigit() else float(text)
    except ValueError:
        return load_yaml(text, key)


def dictionary(request: Request, options: Options) -> int:
    """Fit a dictionary to the activations of a layer, and write it to a file for `layers.dictionary`."""
    values = {key: _scalar(value, key) for key, value in options.values.items()}
    missing = [key for key in ("layer", "out") if not values.get(key)]
    if missing:
        example = "atlas dictionary layer=blocks.5.3 latents=4096 out=sae.safetensors"
        raise AtlasError(f"`atlas dictionary` needs {missing[0]}=…, as in {example}.")
    wanted = build(DictionaryConfig, values)
    config = request.config
    model = load_model(config.model).to("cpu")
    layers = {layer.name: layer for layer in list_layers(model, config.layers, config.model.aliases)}
    if wanted.layer not in layers:
        raise AtlasError(f"{model.name} has no layer {wanted.layer!r}. {nearest_names(wanted.layer, layers)}")
    dataset = datasets.list_dataset(config.data, model.preprocessing.channels)
    facts = fitting.fit(model, layers[wanted.layer], dataset, wanted)
    print(f"{wanted.out}: {', '.join(f'{name} {value}' for name, value in fitting.described(facts))}")
    print(f"its latents as units: atlas run layers.dictionary={wanted.out}@{wanted.layer}")
    return COMPLETE


def _fetched(run: str, config: Config) -> str:
    """Return the folder of a run to compare on this machine; one in an object store is fetched."""
    url = run if is_url(run) else f"{config.run.root.rstrip('/')}/{run}"
    if not is_url(url):
        return run
    root, name = split_url(url)
    return str(RunFolder(local_root(root, config.run.scratch) / name, url).existing("atlas.h5").path)


def _stored_config(folder: RunFolder) -> Config:
    """Return the configuration of an existing run that the user trusts: it may import code, but downloads nothing."""
    config = from_tree(folder.read_config())
    return dataclasses.replace(config, data=dataclasses.replace(config.data, download=False))


def _stored_plan(folder: RunFolder) -> Plan:
    """Return the plan of an existing run that the user trusts, from its stored configuration, for this machine.

    Nothing is timed, and no base run is read. If the files of the dataset are elsewhere, it is the recorded one.
    """
    config = _stored_config(folder)
    units = {name: tuple(channels) for name, channels in folder.planned_channels().items()}
    engine = execution.for_verification(config.engine)
    config = dataclasses.replace(config, base=None, only=None, judges={}, engine=engine)
    root = config.data.root
    here = root is None or is_url(root) or Path(root).expanduser().exists()
    listed = None if here else maintenance.recorded_dataset(folder.atlas)
    return make_plan(config, timed=False, units=units or None, listed=listed)


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        work: Executes the verb; returns the exit code.
        help: Description in the list of verbs.
        on_folder: Whether the verb reads an existing run and takes its folder as an argument.
        keys: Options of the verb that are written as key=value.
        flags: Options of the verb that are written as --flag.
    """

    work: Callable[[Request, Options], int]
    help: str
    on_folder: bool = False
    keys: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


VERBS = {
    "run": Verb(run, "plan, dataset pass, visualizations, atlas.h5 and site: whatever of them is missing"),
    "plan": Verb(plan, "the table of layers and the time that a run will take"),
    "examples": Verb(examples, "the dataset pass alone"),
    "render": Verb(render, "the visualizations alone"),
    "site": Verb(site, "build the site again from atlas.h5: only what changed", True),
    "serve": Verb(serve, "show the site on this machine: atlas serve runs/NAME port=8000", True, ("port",)),
    "publish": Verb(publish, "prepare the site for github, gitlab, cloudflare, huggingface or bucket", True),
    "status": Verb(status, "the progress of a run", True),
    "verify": Verb(verify, "check a run for damaged or wrong files", True),
    "repair": Verb(repair, "set aside damaged files and keep their intact parts; `run` makes the rest again", True),
    "compact": Verb(compact, "delete the shards whose content atlas.h5 has", True),
    "export": Verb(export, "write the table of units: --parquet (default) or --csv", True, flags=("parquet", "csv")),
    "names": Verb(
        naming.names,
        "names of units: a table (out=FILE.csv --all); import=FILE.csv author=NAME; or by a local CLIP model: "
        "clip=FOLDER with words=FILE, text=…, image=FILE or other=RUN",
        True,
        naming.KEYS,
        naming.FLAGS,
    ),
    "compare": Verb(compare_runs, "compare runs, as tables and a site: runs=[distill,tv] presets=[…] out=FOLDER"),
    "grid": Verb(
        grid,
        "what a layer sees at each position of a photograph: layer=NAME image=FILE out=grid.png cells=14",
        keys=("layer", "image", "out", "cells"),
    ),
    "dictionary": Verb(
        dictionary,
        "fit a sparse autoencoder, a decomposition or a concept to a layer: layer=NAME out=FILE.safetensors",
        keys=tuple(field.name for field in dataclasses.fields(DictionaryConfig)),
    ),
    "spectrum": Verb(spectrum, "measure the amplitude spectrum of the images in data=…: out=mine.npz", keys=("out",)),
}
