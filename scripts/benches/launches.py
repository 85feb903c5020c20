"""Count what one optimization step of every preset would launch on a GPU, without one.

scripts/bench launches [--model resnet18] [--layer layer3.1.conv2] [--classes fc] [--size 64]

Tensors on the device "meta" stand for those of a GPU. For a steady step (after those that look for units without
gradient): operations on the device, about one kernel each; how often the host waits for the device; copies to the
device that it does not wait for. And for one of the first steps, with and without silent units.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from gpu_blocks.launches import rendering_job, step_launches

from pipeline.acceleration.redirected_relu import REDIRECTED_STEPS
from pipeline.cli.compose import compose
from pipeline.core.config_files import load_config_files
from pipeline.models.loading import load_model

PRESETS = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "conf" / "render").glob("*.yaml"))
STEADY, STEPS = REDIRECTED_STEPS + 4, REDIRECTED_STEPS + 8


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--layer", default="layer3.1.conv2")
    parser.add_argument("--classes", default="fc", help="layer for presets of classes")
    parser.add_argument("--size", type=int, default=64)
    options = parser.parse_args()
    config = compose([f"model={options.model}", "run.name=bench"]).config
    model = load_model(dataclasses.replace(config.model, weights=None))
    say(f"{options.model} to {options.layer}, {options.size} px: operations of a step on the device")
    say("| preset | steady step | waits | copies | first steps | waits | with silent units | waits |")
    say("|---|---|---|---|---|---|---|---|")
    for name in PRESETS:
        preset = compose([f"render={name}", f"render.steps={STEPS}", "run.name=bench"]).config.render
        preset = load_config_files(preset, "render")
        layer = options.classes if name == "oygard" else options.layer
        job = rendering_job(model, preset, layer, options.size, "meta")
        counts = [
            step_launches(job, STEADY),
            step_launches(job, 3),
            step_launches(job, 3, lambda place: True),
        ]
        assert not any(found.mixed for found in counts), "operations on tensors of two devices"
        steady, first, silent = (sum(found.kernels.values()) for found in counts)
        waits = [len(found.transfers) for found in counts]
        say(f"| {name} | {steady} | {waits[0]} | {counts[0].uploads} | {first} | {waits[1]} | {silent} | {waits[2]} |")


if __name__ == "__main__":
    main()
