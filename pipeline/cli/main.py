"""The command line: `atlas <verb> [group=choice] [key=value] …`.

Hydra composes the configuration; this module turns it into frozen dataclasses, calls the stages and maps what
happened to an exit code: 0 complete, 1 something was set aside or is wrong, 2 bad input, 130 interrupted.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline import compare
from pipeline.cli.overrides import Compare, as_text, compared, conf_folder, explain, named, reference, target
from pipeline.compare.console import show
from pipeline.config.schema import Config, from_tree
from pipeline.core import interrupts
from pipeline.core.errors import AtlasError, nearest
from pipeline.data import datasets, image_loading, natural_spectrum
from pipeline.engine.progress import clock, told
from pipeline.models.loading import load
from pipeline.runs import maintenance, runner
from pipeline.runs.folder import RunFolder
from pipeline.runs.planner import Plan, make_plan
from pipeline.runs.runner import BAD_INPUT, COMPLETE, INTERRUPTED, SET_ASIDE, Request
from pipeline.site.hosting.hosts import prepare
from pipeline.site.hosting.serve import server
from pipeline.store.reader import open_atlas
from pipeline.store.shards import making, safe

log = logging.getLogger("pipeline")

USAGE = """\
usage: atlas VERB [group=choice] [key=value] …

  run        plan, examples, pictures, atlas.h5 and site: whatever of them is missing
  plan       the table of layers and the time a run will take
  examples   the dataset pass alone
  render     the pictures alone
  site       the pages again, from atlas.h5: only what changed
  serve      show the pages on this machine: atlas serve runs/NAME port=8000
  publish    make the pages ready for github, gitlab, cloudflare, huggingface or bucket: atlas publish github runs/NAME
  status     how far a run is
  verify     what is wrong with a run, if anything
  repair     set aside what is broken and keep what is whole of it; `run` makes the rest again
  compact    delete the shards that atlas.h5 holds
  export     the table of units as a file of its own: --parquet (the default) or --csv
  compare    runs against each other, as tables and as a site: runs=[distill,tv] presets=[…] out=runs/compare-distill-tv
  spectrum   amplitudes and colours of the photographs in data=…, for canvases: out=mine.npz

`atlas run --help` shows all settings. The verbs from site on also take a run's folder: atlas verify runs/NAME."""

# Side of the squares that `atlas spectrum` measures, in pixels.
SPECTRUM_SIDE = 128


class _Stderr(logging.Handler):
    """Writes to whatever stderr is now, so that messages stay above live bars."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        sys.stderr.write(f"{prefix}{self.format(record)}\n")


def request_of(composed: DictConfig) -> Request:
    """A typed request from what Hydra composed; the run's name is filled in where it is left open."""
    tree: Any = OmegaConf.to_container(composed, resolve=True)
    tree.pop("hydra", None)
    tree.pop("experiment", None)
    if not tree.get("also"):
        tree.pop("also", None)
    network = tree.get("model")
    if isinstance(network, dict) and network.get("name") is None and "target" in network:
        place = str(network["target"] or "custom").partition(":")[0]
        network["name"] = safe(Path(place).name.removesuffix(".py").removesuffix(".pt2"))
    section = tree.get("run")
    if isinstance(section, dict) and section.get("name") is None:
        section["name"] = safe(f"{tree['model'].get('name')}-{tree['render'].get('name')}")
    config = from_tree(tree)
    # Not with OmegaConf, to which a `${` in a path is a reference.
    return Request(config, tree, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def show_plan(made: Plan) -> None:
    """The table of layers, the totals by kind, and the ETA, on standard output."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("layer", "kind", "channels", "map", "receptive field", "units", "canvas", "time"):
        table.add_column(name, justify="left" if name in ("layer", "kind") else "right", no_wrap=name == "layer")
    written = made.table()
    rows = written.to_dict("records")
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        seconds["layer", row["layer"]] += row["seconds"]
        seconds["preset", row["preset"]] += row["seconds"]
    main = written[written["preset"] == made.config.render.name]
    for row in rows[: len(main)]:
        values = [row[key] for key in ("layer", "kind", "channels", "map", "receptive_field", "units", "canvas")]
        table.add_row(*map(str, values), clock(seconds["layer", row["layer"]]))
    console.print(table)
    kinds = main.groupby("kind", sort=False)
    for kind, part in kinds:
        console.print(f"{kind}: {len(part)} layers, {part['channels'].sum():,} channels, {part['units'].sum():,} units")
    photographs = len(made.setup.dataset.photos)
    for preset in made.config.presets if made.config.also else ():
        console.print(
            f"{preset.name}: {made.units * preset.variants:,} pictures, {clock(seconds['preset', preset.name])}"
        )
    console.print(f"total: {len(made.layers)} layers, {made.units:,} units, {photographs:,} photographs")
    for line in made.outlook():
        console.print(line, soft_wrap=True)


def _run(request: Request) -> int:
    made = runner.plan(request)
    show_plan(made)
    return runner.run(request, made)


def _plan(request: Request) -> int:
    show_plan(runner.plan(request))
    log.info("written to %s", request.folder.plan)
    return COMPLETE


def _examples(request: Request) -> int:
    return runner.run(request, runner.plan(request), ("examples",))


def _render(request: Request) -> int:
    return runner.run(request, runner.plan(request), ("render",))


def _site(request: Request) -> int:
    folder = request.folder.existing()
    with folder.locked():
        runner.build_site(request, folder)
    return COMPLETE


def _serve(request: Request, port: str = "8000") -> int:
    """Until somebody presses Ctrl-C."""
    if not port.isdigit():
        raise AtlasError(f"port={port!r} must be a number.")
    with server(request.folder.existing().site, int(port)) as found:
        print(f"http://127.0.0.1:{found.server_port}/index.html (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            found.serve_forever()
    return COMPLETE


def _publish(request: Request, target: str = "") -> int:
    folder = request.folder.existing()
    report, command = prepare(folder.site, target, request.config.site.title)
    print("\n".join([*report.lines(), "", "Ready. What is left to type:", "", f"  {command}"]))
    return COMPLETE


def _status(request: Request) -> int:
    folder = request.folder.existing()
    status = folder.read_status()
    planned = folder.planned()
    print(f"{folder.path}: {len(planned)} layers, {sum(map(len, planned.values())):,} units planned")
    for name, stage in status.get("stages", {}).items():
        counts = f"{stage['done']:,} of {stage['total']:,}, {stage['failed']} failed"
        rate = f", {stage['per_second']} a second" if "per_second" in stage else ""
        print(f"  {name}: {counts}{rate}")
    if status.get("finished"):
        print(f"  complete since {status['updated']}, {status['failures']} failures")
    elif status:
        left = status.get("eta_seconds")
        crew = f", {status['workers']} workers" if folder.at_work() and "workers" in status else ""
        print(f"  as of {status['updated']}{crew}{'' if left is None else f', about {clock(left)} left'}")
        if not folder.at_work():
            print("  nobody is at work on this machine; `atlas run` goes on")
    else:
        print("  not begun; `atlas run` begins")
    for line in told(status["report"]) if "report" in status else ():
        print(f"  {line}")
    return COMPLETE


def _kept_config(folder: RunFolder) -> Config:
    """What a run that is there was made with."""
    return from_tree(yaml.safe_load(folder.config.read_text(encoding="utf-8")))


def _stored(request: Request) -> Plan:
    """The plan of a run that is there, from what it was made with; nothing is timed, and no base is asked."""
    folder = request.folder.existing()
    config = _kept_config(folder)
    units = {name: tuple(channels) for name, channels in folder.planned().items()}
    return make_plan(dataclasses.replace(config, base=None, only=None), timed=False, units=units or None)


def _table(rows: Sequence[tuple[str, str]], title: str) -> None:
    table = Table("where", title, box=None)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _verify(request: Request) -> int:
    folder = request.folder.existing()
    sample = request.config.run.check
    # Another network may not even have the layers of the plan.
    wrong = maintenance.another_network(folder, _kept_config(folder).model) if sample else []
    wrong += maintenance.verify(folder, _stored(request) if sample and not wrong else None, sample)
    if not wrong:
        print(f"{folder.path}: whole")
        return COMPLETE
    _table(wrong, "what is wrong")
    return SET_ASIDE


def _repair(request: Request) -> int:
    folder = request.folder.existing()
    with folder.locked():
        done = maintenance.repair(folder)
    if not done:
        print(f"{folder.path}: nothing is broken")
        return COMPLETE
    _table(done, "what was done")
    print("`atlas run` makes what is missing now")
    return COMPLETE


def _compact(request: Request) -> int:
    folder = request.folder.existing()
    made = _stored(request)
    with folder.locked():
        done = maintenance.compact(folder, made)
    print(f"{folder.path}: {done.removed} shards deleted, {done.bytes / 1e6:.1f} MB; {done.kept} kept")
    return COMPLETE


def _export(request: Request, kind: str = "parquet") -> int:
    folder = request.folder.existing()
    with open_atlas(folder.path) as atlas:
        units = atlas.units()
    path = folder.path / f"units.{kind}"
    with making(path) as temporary:
        if kind == "parquet":
            units.to_parquet(temporary, index=False)
        else:
            units.to_csv(temporary, index=False)
    print(f"{path}: {len(units):,} rows, {len(units.columns)} columns")
    return COMPLETE


def _compare(request: Request, asked: Compare) -> int:
    """Tables and a site of runs beside each other, in a folder of their own."""
    config = request.config
    names = [safe(Path(run).name.removesuffix(".h5")) for run in asked.runs]
    out = Path(asked.out or Path(config.run.root) / "-".join(["compare", *names]))
    with compare.opened(asked.runs, asked.presets, Path(config.run.root)) as contest:
        made = compare.build(contest, out, config.site)
    show(made.comparison, Console(width=None if sys.stdout.isatty() else 160))
    print(f"{out / 'index.html'}: {made.host.files:,} files, {made.host.bytes / 1e6:.1f} MB; compare.csv, summary.csv")
    return COMPLETE


def _spectrum(request: Request, out: str | None = None) -> int:
    """Measure the middles of the photographs as the network sees them, and keep the result as a small .npz."""
    if out is None:
        raise AtlasError("Where to? `atlas spectrum out=mine.npz`.")
    recipe = load(request.config.model).recipe
    dataset = datasets.listing(request.config.data, recipe.channels)
    side = min(*recipe.size, SPECTRUM_SIDE)
    top, left = ((length - side) // 2 for length in recipe.size)
    every = image_loading.load(dataset, range(len(dataset.photos)), recipe)
    found = [loaded.array for loaded in every if loaded.array is not None]
    measured = natural_spectrum.measure([image[:, top : top + side, left : left + side] for image in found])
    with making(Path(out)) as temporary:
        temporary.write_bytes(measured.content())
    print(f"{out}: {len(found):,} of {len(dataset.photos):,} photographs, {side} x {side} pixels")
    return COMPLETE


VERBS: dict[str, Callable[[Request], int]] = {
    "run": _run,
    "plan": _plan,
    "examples": _examples,
    "render": _render,
    "site": _site,
    "serve": _serve,
    "publish": _publish,
    "status": _status,
    "verify": _verify,
    "repair": _repair,
    "compact": _compact,
    "export": _export,
    "spectrum": _spectrum,
    "compare": lambda request: _compare(request, Compare((), (), None)),
}


def _complete(arguments: Sequence[str]) -> int | None:
    """Shell completion asks without a verb: complete the verb here, or take it off the line for Hydra."""
    line = os.environ.get("COMP_LINE", "").split(" ")
    if "-sc" not in arguments or not any(a.startswith("query=") for a in arguments):
        return None
    if len(line) < 3 and (len(line) < 2 or line[1] not in VERBS):
        print(" ".join(VERBS))
        return COMPLETE
    os.environ["COMP_LINE"] = " ".join([line[0], *line[2:]])
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script `atlas`; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    completed = _complete(arguments)
    if completed is not None:
        return completed
    if "-sc" in arguments and arguments[0] not in VERBS:
        arguments = ["run", *arguments]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return COMPLETE if arguments else BAD_INPUT
    if arguments[0] == "--version":
        print(f"atlas {_version()}")
        return COMPLETE
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        return _refuse(f"There is no verb {verb!r}. {nearest(verb, VERBS)}")
    work = VERBS[verb]
    if verb == "export":
        kinds = [argument.removeprefix("--") for argument in rest if argument in ("--parquet", "--csv")]
        rest = [argument for argument in rest if argument.removeprefix("--") not in kinds]
        work = functools.partial(_export, kind=kinds[-1] if kinds else "parquet")
    if verb == "spectrum":
        places = [argument.removeprefix("out=") for argument in rest if argument.startswith("out=")]
        rest = [argument for argument in rest if not argument.startswith("out=")]
        work = functools.partial(_spectrum, out=places[-1] if places else None)
    if verb == "serve":
        ports = [argument.removeprefix("port=") for argument in rest if argument.startswith("port=")]
        rest = [argument for argument in rest if not argument.startswith("port=")]
        work = functools.partial(_serve, port=(ports or ["8000"])[-1])
    if verb == "compare":
        work = functools.partial(_compare, asked=compared(rest)[0])
    if verb == "publish":
        work = functools.partial(_publish, target=target(rest)[0])
    codes: list[int] = []
    composing = [True]

    def task(composed: DictConfig) -> None:
        composing.clear()
        codes.append(_guarded(lambda: work(_asked(composed, overrides))))
        if codes[-1] == INTERRUPTED:
            raise KeyboardInterrupt

    # Hydra prints a composition error and exits with 1, unless told to raise it; bad input must exit with 2.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    saved = sys.argv
    overrides = named(verb, rest)
    sys.argv = [saved[0], *overrides]
    try:
        with interrupts.listening():
            hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(task)()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if not composing:  # a fault of ours in the work itself: show all of it
            raise
        return _refuse(explain(error, overrides))
    finally:
        sys.argv = saved
        GlobalHydra.instance().clear()
    return max(codes, default=COMPLETE)


def _asked(composed: DictConfig, overrides: Sequence[str]) -> Request:
    """`request_of`, with the quotes that an argument needs in its errors."""
    try:
        return request_of(composed)
    except AtlasError as error:
        hint = as_text(str(error), overrides)
        if not hint:
            raise
        raise AtlasError(f"{error} {hint}") from error
    except (InterpolationResolutionError, GrammarParseError) as error:
        raise AtlasError(reference(error, overrides)) from error


def _guarded(work: Callable[[], int]) -> int:
    """Do `work` with logging on, and turn what a user can mend into a message."""
    handler = _Stderr()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        return work()
    except AtlasError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted. Everything finished is kept; the same command goes on from here.\n")
        return INTERRUPTED
    finally:
        log.removeHandler(handler)
        log.propagate = True


def _refuse(message: str) -> int:
    sys.stderr.write(f"atlas: {message}\n")
    return BAD_INPUT


def _version() -> str:
    from pipeline import __version__

    return __version__
