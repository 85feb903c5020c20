"""Run the complete GPU benchmark in one call of under 9 minutes: two networks, both precisions, a table and JSON.

PYTHONPATH=. python scripts/benches/gpu.py [--device cuda] [--minutes 8] [--every 4] [--batch 64]
                                           [--models efficientnet_lite0,resnet50] [--out gpu.json]

Measures, for every fourth convolution in turn, the bare loop and the complete optimization step, as
`scripts/bench render` does. The layers between are counted with the values of the measured one before them. Weights are
random, which does not affect the time. Prints which measurements did not fit into the time limit. Nothing is installed:
PyTorch, timm, h5py, hydra-core and pandas must be available.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from render import config_of, measured, say

from pipeline.acceleration.batchnorm_folding import fold
from pipeline.config.schema import Config
from pipeline.layers.finding import Layer
from pipeline.layers.receptive_fields import receptive_fields
from pipeline.layers.selection import LayersConfig, list_layers, select_layers
from pipeline.models.loading import Model, load_model


def network(name: str) -> tuple[Config, Model, list[Layer]]:
    """Return the configuration, the network with random weights, and its convolutions with receptive fields."""
    config = config_of("distill", name)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights=None))
    model, policy = load_model(config.model), LayersConfig("convs")
    candidates = select_layers(model, list_layers(model, policy, config.model.aliases), policy)
    chosen = [layer for layer in candidates if layer.kind == "conv"]
    fields = receptive_fields(fold(model), chosen)
    return config, model, [dataclasses.replace(layer, field=fields[layer.name]) for layer in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--models", default="efficientnet_lite0,resnet50")
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    over = time.monotonic() + 60 * options.minutes
    card = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else options.device
    found, left = [], []
    for name in options.models.split(","):
        config, model, layers = network(name)
        model = model.to(options.device)
        for precision in options.precisions.split(","):
            engine = dataclasses.replace(config.engine, precision=precision)
            seconds, total = 0.0, 0.0
            for i, layer in enumerate(layers):
                if i % options.every == 0:
                    if time.monotonic() > over:
                        left.append(f"{name} {precision} from {layer.name}")
                        break
                    own = dataclasses.replace(config, engine=engine)
                    row = measured(model, layer, own, options.batch, options.seconds, options.device)
                    found.append({"model": name, "precision": precision, **row})
                    seconds = row["seconds a channel"]
                    say(json.dumps(found[-1]))
                total += seconds * layer.channels
            else:
                channels = sum(layer.channels for layer in layers)
                say(f"{name}, {precision}, {card}: {channels:,} channels in {total / 60:.1f} min")
    for missing in left:
        say(f"no time for {missing}")
    options.out.write_text(
        json.dumps({"device": card, "torch": torch.__version__, "rows": found, "left": left}, indent=1)
    )


if __name__ == "__main__":
    main()
