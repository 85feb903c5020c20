#!/usr/bin/env python3
"""Seconds that `atlas plan` takes on each architecture, one after the other: scripts/bench plans [name …]"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = {
    "torchvision": (
        "alexnet", "vgg16", "googlenet", "inception_v3", "resnet18", "resnet50", "densenet121", "mobilenet_v2",
        "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "regnet_y_400mf", "vit_b_16", "swin_t",
    ),
    "timm": ("deit_tiny_distilled_patch16_224",),
}  # fmt: skip


def main() -> None:
    atlas = Path(sys.executable).parent / "atlas"
    wanted = sys.argv[1:]
    with tempfile.TemporaryDirectory() as root:
        for source, names in NAMES.items():
            for name in names:
                if wanted and name not in wanted:
                    continue
                model = [f"model={source}", f"model.name={name}", "model.weights=null"]
                began = time.perf_counter()
                done = subprocess.run(
                    [atlas, "plan", *model, "layers=convs", f"run.root={root}"], capture_output=True, text=True
                )
                seconds = time.perf_counter() - began
                lines = [line for line in done.stdout.splitlines() if line.startswith("conv:")] or [done.stderr.strip()]
                print(f"{name:32} {seconds:6.1f} s   {lines[-1]}", flush=True)


if __name__ == "__main__":
    main()
