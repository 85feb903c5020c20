"""Measure what the transparency mask costs: the optimization loop with it and without it, alternating in one process.

scripts/bench mask [--layers blocks.3.1.conv_pw,blocks.5.3.conv_pwl] [--steps 20] [--rounds 8]

Renders 16 channels of each layer with the default preset on one thread. Prints the median of the ratios of processor
times of all rounds, with the ends of its 90 % range by resampling the rounds, and checks that no pixel differs.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import paired
import torch

from pipeline.visualization import loop


def without_mask(gradient: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Stand in for `gradient_magnitude`: what is added to the sums is 0."""
    return torch.zeros(())


def seconds(work: Callable[[], Any], magnitude: Callable[..., torch.Tensor]) -> tuple[float, Any]:
    """Return the processor seconds of `work` with an implementation of `gradient_magnitude`, and what it returns."""
    original, loop.gradient_magnitude = loop.gradient_magnitude, magnitude
    try:
        began = time.process_time()
        result = work()
        return time.process_time() - began, result
    finally:
        loop.gradient_magnitude = original


def measure(layer: str, steps: int, rounds: int) -> np.ndarray:
    """Return the time with the mask ÷ the time without it of each round."""
    work = paired.rendering(layer, steps)
    with_mask = loop.gradient_magnitude
    work()
    ratios = []
    for i in range(rounds):
        order = [with_mask, without_mask] if i % 2 else [without_mask, with_mask]
        results = {one: seconds(work, one) for one in order}
        pairs = zip(results[with_mask][1], results[without_mask][1], strict=True)
        if not all(np.array_equal(a.image, b.image) for a, b in pairs):
            sys.exit(f"{layer}: the mask changes pixels")
        ratios.append(results[with_mask][0] / results[without_mask][0])
    return np.array(ratios)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line for each layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="blocks.3.1.conv_pw,blocks.5.3.conv_pwl")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args(arguments)
    for layer in options.layers.split(","):
        ratios = measure(layer, options.steps, options.rounds)
        draws = np.random.default_rng(0).choice(ratios, (1000, len(ratios)))
        low, high = np.quantile(np.median(draws, axis=1), [0.05, 0.95])
        sys.stdout.write(f"{layer}: {np.median(ratios):.3f} times the time without the mask ({low:.3f}–{high:.3f})\n")


if __name__ == "__main__":
    main()
