"""Compare the plan of a complete atlas with the time of units drawn at random over all convolutions.

scripts/bench night [--units 400] [--model efficientnet_lite0] [--render distill] [--seed 0] [key=value …]

Plans all channels of `layers=convs`, then plans and renders the sample. Prints both plans, the time of the sample, that
time extrapolated to all channels, and the maximum memory of any worker. The sample has shorter batches than all
channels of a layer have, so the complete run takes less time than extrapolated.
"""

import argparse
import json
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from render import say

from pipeline.cli.compose import compose
from pipeline.kernels.allocator import retain_freed_memory
from pipeline.planning.planner import make_plan
from pipeline.runs.runner import run


class Memory(threading.Thread):
    """The maximum resident memory of any process below this one, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    # Ray's own processes have fixed names; a worker is named after its current task.
                    if "Worker" in process.name() or "Worker" in " ".join(process.cmdline()):
                        self.most = max(self.most, process.memory_info().rss)
                except psutil.Error:
                    continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=400)
    parser.add_argument("--model", default="efficientnet_lite0")
    parser.add_argument("--render", default="distill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    retain_freed_memory()
    base = [f"model={options.model}", f"render={options.render}", f"run.root={options.out}", *options.overrides]
    whole = make_plan(compose([*base, "layers=convs", "layers.exclude=[classifier]", "run.name=night-all"]).config)
    everything = [(row.layer.name, channel) for row in whole.rows for channel in row.channels]
    drawn = np.random.default_rng(options.seed).permutation(len(everything))[: options.units]
    table = options.out / "night.csv"
    options.out.mkdir(parents=True, exist_ok=True)
    table.write_text("layer,channel\n" + "".join(f"{everything[i][0]},{everything[i][1]}\n" for i in sorted(drawn)))
    asked = compose([*base, f"units={table}", "run.name=night"])
    made = make_plan(asked.config)
    say(f"all {len(everything):,} channels: planned {whole.eta / 3600:.2f} h")
    memory = Memory()
    memory.start()
    began = time.perf_counter()
    code = run(asked, made, ("render",))
    took = time.perf_counter() - began
    memory.over.set()
    found = {
        "units": len(drawn), "planned, s": round(made.eta), "took, s": round(took),
        "took ÷ planned": round(took / made.eta, 3), "all, planned, h": round(whole.eta / 3600, 2),
        "all, from the drawn, h": round(took / len(drawn) * len(everything) / 3600, 2),
        "most memory of a worker, GiB": round(memory.most / 2**30, 2), "exit": code,
    }  # fmt: skip
    say(" · ".join(f"{key} {value}" for key, value in found.items()))
    Path(options.out, "night.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
