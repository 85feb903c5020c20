"""Measure the share of the transparency mask in the time of optimization steps.

scripts/bench mask [--layers blocks.3.1.conv_pw,blocks.5.3.conv_pwl] [--steps 8]

Renders 16 channels of each layer with the default preset on one thread, and times the part of every step that sums
the gradient (`gradient_magnitude` and an addition of the same size) within the same steps. Prints its share of the
processor time of all steps; the evaluation of the finished images does not count. Two runs, with the mask and without
it, differ by more than that from noise alone.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import paired
import torch

from pipeline.visualization import loop, step


class Stopwatch:
    """Processor seconds spent in a function, and in all of the calls of another one."""

    def __init__(self) -> None:
        self.mask = self.steps = 0.0
        self._magnitude, self._optimize = step.gradient_magnitude, loop._optimize

    def magnitude(self, gradient: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Do what `gradient_magnitude` does and an addition, timed."""
        began = time.process_time()
        result = self._magnitude(gradient, size)
        torch.zeros_like(result).add_(result)
        self.mask += time.process_time() - began
        return result

    def optimize(self, *arguments: object) -> None:
        """Do what `_optimize` does, timed."""
        began = time.process_time()
        self._optimize(*arguments)  # type: ignore[arg-type]
        self.steps += time.process_time() - began


def measure(layer: str, steps: int) -> tuple[float, float]:
    """Return the processor seconds of the mask and of all steps, for one batch."""
    work = paired.rendering(layer, steps)
    work()  # allocates memory and compiles kernels
    watch = Stopwatch()
    step.gradient_magnitude, loop._optimize = watch.magnitude, watch.optimize
    try:
        work()
    finally:
        step.gradient_magnitude, loop._optimize = watch._magnitude, watch._optimize
    return watch.mask, watch.steps


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="blocks.3.1.conv_pw,blocks.5.3.conv_pwl")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args(arguments)
    for layer in options.layers.split(","):
        mask, total = measure(layer, options.steps)
        each = 1e3 / options.steps
        sys.stdout.write(f"{layer}: {mask / total:.2%} of a step ({mask * each:.2f} of {total * each:.0f} ms)\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
