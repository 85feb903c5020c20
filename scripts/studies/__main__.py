"""Run a study: `scripts/study NAME [key=value …]`, with settings in conf/experiment/study and a page in docs."""

import importlib
import re
import shutil
import sys
import time
from pathlib import Path

from page import publish

from pipeline.cli.main import main

HERE = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("__main__", "page"))


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    name, *settings = sys.argv[1:] or [""]
    if name not in NAMES:
        raise SystemExit(f"scripts/study NAME [key=value …], one of: {' '.join(NAMES)}")
    study = importlib.import_module(name)
    began = time.perf_counter()
    if hasattr(study, "prepare"):
        study.prepare()
    given = dict(setting.split("=", 1) for setting in settings if "=" in setting)
    # Other settings get another run folder, for example study-mosaic-layers.include.
    own = re.sub(r"[^\w.]+", "-", "-".join(["study", name, *settings])).strip("-")
    run = Path(given.get("run.root", "runs"), given.get("run.name", own))
    code = main(["run", f"experiment=study/{name}", *settings, f"run.name={run.name}"])
    if code not in (0, 1):
        raise SystemExit(code)
    report = study.report(run)
    page = HERE.parents[1] / "docs" / "studies" / f"{name}.md"
    if settings:
        # The page in docs reports the study with its own settings; other settings get a separate page.
        page = Path(shutil.copy(page, run))
    publish(report, page)
    for title, table in report.tables.items():
        say(f"\n{title}\n{table.to_string(index=False)}")
    say(f"\n{page} and {page.stem}.jpg, {(time.perf_counter() - began) / 60:.1f} minutes")
