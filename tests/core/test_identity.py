"""Digests and seeds are part of stored results: they must not change with names of classes, modules or fields."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import compose

from pipeline.core.registry import canonical, registered_name
from pipeline.core.seeds import seed_of
from pipeline.data.datasets import Dataset
from pipeline.engine.tasks import Setup, examples_digest, localize_digest, render_digest
from pipeline.layers.finding import Layer

# This file, run as a script with `.:tests` as PYTHONPATH, writes it again. A difference means that results of earlier
# versions are stale: if more than the settings of a preset changed, raise the version of that kind of result in
# pipeline/engine/tasks.py; say so in CHANGELOG.md, or undo the change.
PINNED = Path(__file__).parents[1] / "data" / "identity.json"

PRESETS = ("naive", "distill", "lucid", "tv", "maco", "neuron", "negative", "diverse", "weight_noise", "oygard")


HIDDEN = Layer("layer1.0", "conv", "layer1.0.bn", 1, "out", "maps", 8, 14, 14, 1.0)
LOGITS = Layer("fc", "linear", "fc", 1, "out", "vector", 10, 1, 1, 1.0)


def setup(preset: str, *overrides: str) -> Setup:
    config = compose([f"render={preset}", "engine.precision=float32", *overrides]).config
    return Setup(config, "0" * 64, (HIDDEN, LOGITS), Dataset((), {}), 1, "cpu")


def identities() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for preset in PRESETS:
        made = setup(preset)
        found[f"render {preset}"] = render_digest(made, HIDDEN, (128, 128), preset)
        found[f"render {preset}, logits"] = render_digest(made, LOGITS, (128, 128), preset)
    fixed = setup("tv", "render.penalties.tv.budget=null")
    found["render tv, fixed weight"] = render_digest(fixed, fixed.layers[0], (128, 128), "tv")
    made = setup("distill")
    found["examples"] = examples_digest(made, "1" * 64)
    found["localize"] = localize_digest(made, "2" * 64, [(0, 1, 2)])
    found["seed"] = seed_of(0, "efficientnet_lite0", "layer1.0", 17, "channel", 0, 0)
    return found


def test_digests_and_seeds_are_those_of_earlier_versions() -> None:
    assert identities() == json.loads(PINNED.read_text())


def test_what_changes_pixels_is_in_the_digest() -> None:
    made = setup("distill")
    layer = made.layers[0]

    def digest(**changes: Any) -> str:
        return render_digest(dataclasses.replace(made, **changes), layer, (128, 128), "distill")

    assert len({digest(), digest(precision="bfloat16"), digest(device="cuda"), digest(weights="1" * 64)}) == 4
    assert digest(device="cuda:0") == digest(device="cuda:3") and digest(threads=7) == digest()


def test_steps_in_float32_only_are_the_same_with_any_precision() -> None:
    """Noise on the network is applied to the original weights, whatever `engine.precision` says."""
    made = setup("weight_noise")
    other = dataclasses.replace(made, precision="bfloat16")
    assert len({render_digest(s, made.layers[0], (128, 128), "weight_noise") for s in (made, other)}) == 1


def test_the_objective_of_a_layer_is_in_its_digest_and_an_explicit_one_wins() -> None:
    """`auto` gives the digests of what it stands for, so that results are reused from one to the other."""
    made, explicit = setup("distill"), setup("distill", "render/objective=channel")
    energy = setup("distill", "render/objective=energy", "render/penalties=[l2]")
    layer = made.layers[0]
    linear = dataclasses.replace(layer, linear_in_pixels=True)

    def digest(of: Setup, layer: Layer, preset: str = "distill") -> str:
        return render_digest(of, layer, (128, 128), preset)

    assert digest(made, layer) == digest(explicit, layer) == digest(explicit, linear)
    assert digest(made, linear) == digest(energy, linear) == digest(energy, layer) != digest(made, layer)
    # The least energy is that of a gray image.
    assert digest(setup("negative"), linear, "negative") == digest(setup("negative"), layer, "negative")


def test_the_version_of_layer_penalties_is_in_the_digest_of_presets_that_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def digests() -> list[str]:
        made = [setup(preset) for preset in ("accentuate", "distill")]
        return [render_digest(s, s.layers[0], (128, 128), s.config.render.name) for s in made]

    before = digests()
    monkeypatch.setattr("pipeline.engine.tasks.LAYER_PENALTIES_VERSION", 99)
    assert [old == new for old, new in zip(before, digests(), strict=True)] == [False, True]


@pytest.mark.parametrize("preset", PRESETS)
def test_no_python_name_is_in_an_identity(preset: str) -> None:
    config = compose([f"render={preset}"]).config.render
    members = [config.objective, config.canvas, config.optimizer, config.stop]
    members += [*config.transforms, *config.penalties, *config.augmentations, *config.couplings]
    text = json.dumps(canonical(config))
    for member in members:
        assert f'"{registered_name(member)}"' in text
        assert type(member).__name__ not in text and type(member).__module__ not in text


if __name__ == "__main__":
    PINNED.write_text(json.dumps(identities(), indent=1) + "\n")
