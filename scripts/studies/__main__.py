"""Run a study: `scripts/study NAME [key=value …]`, with the plan in scripts/studies/plans and a page in docs/studies.

scripts/study NAME [key=value …]   make or continue its runs, then write its page, its figure and the index
scripts/study --status             say which pages were made with other settings than the present ones, on the pages too
scripts/study --plan NAME          print the commands of its runs and what they would take
"""

import csv
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from page import PAGES, draw_figure, finding, hypotheses_table, mark_stale, report, write_index, write_page
from plan import Plan, draw_units, plan_names, read_plan
from values import Runs

from pipeline.cli.compose import compose
from pipeline.cli.main import main


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def arguments(plan: Plan, name: str, network: str, condition: str, settings: Sequence[str]) -> tuple[list[str], Path]:
    """Return the arguments of one run, but for its units, and its folder."""
    given = _given(settings)
    run = Path(given.get("run.root", "runs")) / plan.run_name(_name(name, settings), network, condition)
    own = [setting for setting in settings if not setting.startswith("run.name=")]
    chosen = [*plan.overrides(network, condition), *own, f"run.name={run.name}"]
    if plan.is_seed(condition):
        # Another `run.seed` of the user is another set of seeds, and not the same one for all of these runs.
        first = int(given.get("run.seed", "0")) * len(plan.conditions)
        chosen.append(f"run.seed={first + list(plan.conditions).index(condition)}")
    if plan.patterns(network):
        chosen.append("layers.include=[" + ",".join(f"'{pattern}'" for pattern in plan.patterns(network)) + "]")
    return chosen, run


def write_units(plan: Plan, name: str, network: str, settings: Sequence[str]) -> Path:
    """Draw the units of a network, the same ones for all conditions, and write them as a table beside the runs."""
    chosen, run = arguments(plan, name, network, next(iter(plan.conditions)), settings)
    table = run.with_name(f"{plan.run_name(_name(name, settings), network, '')}.csv")
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "channel"])
        writer.writerows(draw_units(plan, name, network, compose(chosen).config))
    return table


def _name(name: str, settings: Sequence[str]) -> str:
    """Return what the runs of a study are named after: `run.name`, or its name with the seed of the user."""
    return _given(settings).get("run.name", _with_seed(name, settings))


def _with_seed(name: str, settings: Sequence[str]) -> str:
    seed = _given(settings).get("run.seed", "0")
    return name if seed == "0" else f"{name}-seed{seed}"


def _given(settings: Sequence[str]) -> dict[str, str]:
    return dict(setting.split("=", 1) for setting in settings if "=" in setting)


def run_all(name: str, plan: Plan, settings: Sequence[str], verb: str) -> Runs:
    """Make or continue all runs of a study; return their folders."""
    runs = {}
    for network in plan.network_names:
        units = [f"units={write_units(plan, name, network, settings)}"] if plan.units else []
        for condition in plan.conditions:
            chosen, run = arguments(plan, name, network, condition, settings)
            chosen += units
            say("atlas " + " ".join([verb, *chosen]))
            code = main([verb, *chosen])
            if code not in (0, 1):
                raise SystemExit(code)
            runs[network, condition] = run
    return runs


def total_minutes(run: Path, minutes: float) -> float:
    """Add the duration of this call to those of the calls that it continues, kept in a file beside the runs."""
    file = run.with_name(f"{run.name}.minutes")
    total = minutes + (float(file.read_text()) if file.is_file() else 0.0)
    file.write_text(f"{total:.2f}\n")
    return total


def study(name: str, settings: Sequence[str]) -> None:
    """Run a study and write its page."""
    plan = read_plan(name)
    if plan.photographs and not any(setting.startswith("data.root=") for setting in settings):
        raise SystemExit(
            f"The study {name} needs photographs, of as many kinds as possible: scripts/study {name} data=folder "
            "data.root=FOLDER"
        )
    began = time.perf_counter()
    runs = run_all(name, plan, settings, plan.verb)
    minutes = total_minutes(next(iter(runs.values())), (time.perf_counter() - began) / 60)
    # The page in docs reports the study as planned; with other settings it is written into the folder of the runs.
    others = [setting for setting in settings if not setting.startswith(("data", "engine", "run.root", "run.update"))]
    made = report(name, plan, runs, minutes, others)
    page = PAGES / f"{name}.md"
    if others:
        page = next(iter(runs.values())).with_name(f"study-{_with_seed(name, settings)}.md")
    write_page(made, page, draw_figure(made, runs))
    if not others:
        write_index()
    say(hypotheses_table(made).to_string(index=False))
    say(f"\n{finding(made)}\n\n{page} and {page.stem}.jpg, {made.minutes:.1f} minutes")


def status() -> None:
    """Print which pages were made with other settings, and say it on them."""
    for name in plan_names():
        page = PAGES / f"{name}.md"
        if page.is_file():
            say(f"{name}: {'settings changed since' if mark_stale(page, read_plan(name)) else 'as its plan'}")
        else:
            say(f"{name}: not run")
    write_index()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--status"]:
            status()
        case ["--plan", name, *settings]:
            run_all(name, read_plan(name), settings, "plan")
        case [name, *settings] if not name.startswith("-"):
            study(name, settings)
        case _:
            raise SystemExit(f"scripts/study NAME [key=value …], one of: {' '.join(plan_names())}")
