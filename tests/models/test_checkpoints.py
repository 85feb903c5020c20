"""Checkpoints as training scripts write them: found in any mapping and under any prefix, or refused with the fix."""

import argparse
import dataclasses
import logging
import re
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, TinyNet, compose, tiny_model
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import Tensor, nn

from pipeline.cli.main import main
from pipeline.core.config_files import ConfigFile
from pipeline.core.errors import AtlasError
from pipeline.engine.tasks import render_digest
from pipeline.models.checkpoints import StateDictSelector, _rank_candidates, load_checkpoint, quoted
from pipeline.models.loading import ModelConfig, load_ensemble_member, load_model, weights_digest
from pipeline.models.state_dicts import Entry
from pipeline.planning.planner import make_plan

State = dict[str, Tensor]


def state(seed: int = 0, prefix: str = "") -> State:
    """All values of a network differ from those of another seed, counters and running statistics too."""
    generator = torch.Generator().manual_seed(seed)
    own = TinyNet().state_dict()
    drawn = {k: torch.rand(v.shape, generator=generator).to(v.dtype) if v.dim() else v + seed for k, v in own.items()}
    return {prefix + name: value for name, value in drawn.items()}


def loads(path: Path, expected: Mapping[str, Tensor], net: nn.Module | None = None, **settings: Any) -> None:
    """The checkpoint fills every tensor of a network with the value that is expected for it."""
    net = TinyNet() if net is None else net
    load_checkpoint(net, path, **settings)
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected[name].to(value.dtype)), name


def renamed(names: State, pattern: str, to: str) -> State:
    return {re.sub(pattern, to, name): value for name, value in names.items()}


def chosen_by(message: str) -> list[dict[str, Any]]:
    """The settings that an error offers, as they come out of a shell and Hydra."""
    offered = message.partition("Choose one: ")[2].removesuffix(".").split(", or ")
    return [{k.removeprefix("model.checkpoint_"): v for k, v in map(parsed, shlex.split(o))} for o in offered]


def parsed(override: str) -> tuple[str, Any]:
    """A setting and its value as Hydra reads them."""
    found = OverridesParser.create().parse_override(override)
    return found.key_or_group, found.value()


# ---- what is found


CASES: dict[str, Any] = {
    "Lightning with a weighted loss": {
        "state_dict": {**state(1, "net."), "criterion.pos_weight": torch.ones(1)},
        "hyper_parameters": {"lr": 0.1},
        "epoch": 3,
    },
    "Lightning, DDP and torch.compile": {"state_dict": state(1, "module.model._orig_mod.")},
    "torch.compile and DDP": state(1, "_orig_mod.module."),
    "one compiled block": renamed(state(1), r"^block\.", "block._orig_mod."),
    "FSDP and activation checkpointing": renamed(
        state(1, "_fsdp_wrapped_module."), r"block\.", "block._checkpoint_wrapped_module."
    ),
    "AveragedModel": {"n_averaged": torch.tensor(3), **state(1, "module.")},
    "deep below keys of no known name": {"run": {"best": {"weights of it": state(1, "a.b.c.")}}},
    "in a list": {"models": [state(1)]},
    "in parts under keys": {
        "stem": {"weight": state(1)["stem.weight"]},
        **{k: {n.partition(".")[2]: v for n, v in state(1).items() if n.startswith(k)} for k in ("norm", "block")},
        **{k: {n.partition(".")[2]: v for n, v in state(1).items() if n.startswith(k)} for k in ("late", "head")},
    },
    "the same tensors twice": {"model": state(1), "best": state(1, "net.")},
    "the same tensors twice, wrapped": {"model": {**state(1), **state(1, "module.")}},
    "the same tensors twice, once without counters": {
        "a": {k: v for k, v in state(1).items() if "num_batches" not in k},
        "in b": state(1),
    },
    "averaged weights beside raw ones": {"state_dict": state(2), "state_dict_ema": state(1)},
    "averaged weights by prefix": {"state_dict": {**state(2, "net."), **state(1, "net_ema.module.")}},
    "averaged weights of parameters alone": {
        "model": state(1),
        "ema": {k: v for k, v in state(2).items() if k in dict(TinyNet().named_parameters())},
    },
    "Lightning's WeightAveraging": {
        "state_dict": state(1, "net."),
        "current_model_state": state(2, "net."),
        "averaging_state": {"n_averaged": torch.tensor(9)},
    },
    "moments named like weights": {"model": state(1), "optimizer": {"exp_avg": state(2), "exp_avg_sq": state(3)}},
    "Adam": {"net": state(1), "optimizer": {"state": {0: {"exp_avg": torch.ones(6, 3, 3, 3)}}, "param_groups": []}},
    "half precision": {"model": {k: v.half() if v.is_floating_point() else v for k, v in state(1).items()}},
    "a second network that does not fit": {"student": state(1), "teacher": {"stem.weight": torch.ones(2, 3, 3, 3)}},
    "objects of training scripts": {
        "model": state(1),
        "args": argparse.Namespace(lr=0.1, output=Path("runs")),
        "best": np.float64(0.5),
        "curve": np.arange(3),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_every_mapping_and_prefix_is_tried(case: str, tmp_path: Path) -> None:
    torch.save(CASES[case], tmp_path / "c.pt")
    expected = CASES[case]["model"] if case == "half precision" else state(1)
    loads(tmp_path / "c.pt", expected)


def test_what_a_plan_takes_and_says(tmp_path: Path, tiny_run: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """The way that users go: settings of the command line, and what was left out named once."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))\n"
    )
    target = f"{tmp_path}/net.py:build"
    net = load_model(ModelConfig("custom", "net", target=target, input_size=32)).module
    two = {k: {f"backbone.{n}": v + i for n, v in net.state_dict().items()} for i, k in enumerate(("first", "second"))}
    torch.save({**two, "loss": {"scale": torch.ones(1)}}, tmp_path / "c.pt")
    common = [o for o in tiny_run if not o.startswith(("model", "layers"))]
    plan = ["plan", *common, "model=custom", f"model.target={target}", "model.input_size=32", "layers=all"]
    plan += [f"model.checkpoint={tmp_path}/c.pt", "data.limit=4"]
    assert main(plan) == 2
    said = capfd.readouterr().err
    assert "2 sets of weights" in said and "model.checkpoint_key=first, or model.checkpoint_key=second" in said
    assert main([*plan, "model.checkpoint_key=second", "model.checkpoint_prefix=backbone."]) == 0
    said = capfd.readouterr().err
    assert said.count("left out") == 1
    assert (
        "weights from key 'second', prefix 'backbone.'; 10 other tensors left out: first.backbone (9), loss.scale"
        in said
    )


def test_a_name_that_wraps_nothing(tmp_path: Path) -> None:
    """A network may have modules of its own called `module`, beside others."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    net = Odd()
    torch.save(net.state_dict(), tmp_path / "c.pt")
    loads(tmp_path / "c.pt", net.state_dict(), Odd())
    torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, tmp_path / "c.pt")
    loads(tmp_path / "c.pt", net.state_dict(), Odd())


def test_a_builder_that_wraps_the_network(tmp_path: Path) -> None:
    torch.save({"state_dict": state(1, "model.")}, tmp_path / "c.pt")
    for stem, wrap in (("0.", nn.Sequential), ("_orig_mod.", torch.compile), ("module.", nn.DataParallel)):
        net: Any = wrap(TinyNet())
        loads(tmp_path / "c.pt", state(1, stem), net)


# ---- several networks


AMBIGUOUS: dict[str, Any] = {
    "keys": {"first": state(1, "backbone."), "second": state(2, "backbone.")},
    "prefixes": {"state_dict": {**state(1, "teacher."), **state(2, "student.")}},
    "the top level and a prefix": {**state(1), **state(2, "student.")},
    "the top level and a key": {**state(1), "student": state(2)},
    "one that is wrapped and one that is not": {**state(1, "module."), **state(2)},
    "keys and prefixes": {"a": {**state(1, "x."), **state(2, "y.")}, "b": state(3, "x.")},
    "keys within keys": {"a": {"x": state(1), "y": state(2)}},
    "words that Hydra takes for something else": {"0": state(1, "1."), "a='b' c": state(2), "null": state(3)},
    "numbers as prefixes": {**state(1, "0."), **state(2, "1.")},
    "two averages": {"ema": {"decay 0.9": state(1), "decay 0.99": state(2)}, "model": state(3)},
    "three of which two are alike": {"a": state(1), "b": state(2), "c": state(1)},
}


@pytest.mark.parametrize("case", AMBIGUOUS)
@pytest.mark.parametrize("strict", [True, False])
def test_several_networks_are_named_and_each_can_be_chosen(case: str, strict: bool, tmp_path: Path) -> None:
    torch.save(AMBIGUOUS[case], tmp_path / "c.pt")
    with pytest.raises(AtlasError, match="sets of weights that fit this network equally well") as caught:
        load_checkpoint(TinyNet(), tmp_path / "c.pt", strict=strict)
    offered = chosen_by(str(caught.value))
    assert len(offered) == (3 if case in ("keys and prefixes", "words that Hydra takes for something else") else 2)
    stems = set()
    for settings in offered:
        net = TinyNet()
        load_checkpoint(net, tmp_path / "c.pt", strict=strict, selector=StateDictSelector(**settings))
        stems.add(net.stem.weight.flatten()[0].item())
    assert stems == {state(i)["stem.weight"].flatten()[0].item() for i in range(1, len(offered) + 1)}


def test_a_part_that_fits_in_two_places_is_not_chosen_silently(tmp_path: Path) -> None:
    parts = {k: {n: v for n, v in state(i).items() if "head" not in n} for i, k in ((1, "teacher"), (2, "student"))}
    torch.save(parts, tmp_path / "c.pt")
    with pytest.raises(AtlasError, match=r"2 tensors are missing, e\.g\. head\.bias, head\.weight"):
        load_checkpoint(TinyNet(), tmp_path / "c.pt")
    with pytest.raises(AtlasError, match="equally well"):
        load_checkpoint(TinyNet(), tmp_path / "c.pt", strict=False)
    net = TinyNet()
    load_checkpoint(net, tmp_path / "c.pt", strict=False, selector=StateDictSelector("student"))
    assert torch.equal(net.stem.weight, state(2)["stem.weight"])


def test_the_weights_that_are_not_averaged_can_be_had(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cases = {
        "model.checkpoint_key=state_dict": {"state_dict": state(2), "state_dict_ema": state(1)},
        "model.checkpoint_prefix=net.": {"state_dict": {**state(2, "net."), **state(1, "ema.")}},
        "model.checkpoint_key=current_model_state": {"state_dict": state(1), "current_model_state": state(2)},
    }
    for number, (setting, content) in enumerate(cases.items()):
        path = tmp_path / f"{number}.pt"
        torch.save(content, path)
        loads(path, state(1))
        assert f"{path}: " in caplog.text and f"({setting} loads those that are not averaged)" in caplog.text
        key, _, value = setting.removeprefix("model.checkpoint_").partition("=")
        loads(path, state(2), selector=StateDictSelector(**{key: value}))


def test_settings_that_match_nothing_say_what_is_there(tmp_path: Path) -> None:
    torch.save({"run": {"a": state(1, "net."), "b": state(2, "module.net.")}}, tmp_path / "c.pt")
    count = len(state())
    with pytest.raises(
        AtlasError, match=rf"checkpoint_key=c: .* no such key .*: run \({2 * count}\), run\.a \({count}\)"
    ):
        load_checkpoint(TinyNet(), tmp_path / "c.pt", selector=StateDictSelector("c"))
    with pytest.raises(AtlasError, match=rf"checkpoint_prefix=head2: no name in .* begins .*net\. \({count}\)"):
        load_checkpoint(TinyNet(), tmp_path / "c.pt", selector=StateDictSelector("run.a", "head2"))
    loads(tmp_path / "c.pt", state(1), selector=StateDictSelector("run.a", "net"))  # a dot at the end is not needed
    loads(tmp_path / "c.pt", state(2), selector=StateDictSelector("run.b", "net."))  # nor what DataParallel inserts
    torch.save(state(1), tmp_path / "bare.pt")
    with pytest.raises(AtlasError, match=r"lie under no key\. Leave it null"):
        load_checkpoint(TinyNet(), tmp_path / "bare.pt", selector=StateDictSelector("model"))
    with pytest.raises(AtlasError, match="Not one tensor fits"):
        load_checkpoint(TinyNet(), tmp_path / "bare.pt", selector=StateDictSelector(None, "stem"))
    loads(tmp_path / "bare.pt", state(1), selector=StateDictSelector("", ""))


def test_choosing_needs_a_checkpoint() -> None:
    for setting in ("model.checkpoint_key=ema", "model.checkpoint_prefix=net."):
        with pytest.raises(AtlasError, match=rf"{setting} chooses within a checkpoint: add model\.checkpoint=FILE"):
            compose([*TINY, setting])
        assert compose([*TINY, setting, "model.checkpoint=c.pt"]).config.model.checkpoint == "c.pt"
        ensemble = ["render/augmentations=[ensemble]", "render.augmentations.ensemble.checkpoints=[a.pt]"]
        assert compose([*TINY, setting, *ensemble])


@pytest.mark.parametrize("value", ["", "a.b", "0", "1.", "null", "a b", "a=b", "it's", 'say "a"', "{x}", "$HOME"])
def test_settings_are_quoted_for_shell_and_hydra(value: str) -> None:
    (typed,) = shlex.split(quoted("model.checkpoint_key", value))
    assert parsed(typed) == ("model.checkpoint_key", value)


def test_quoted_settings_reach_the_configuration() -> None:
    typed = [o for key in ("key", "prefix") for o in shlex.split(quoted(f"model.checkpoint_{key}", "0."))]
    model = compose([*TINY, "model.checkpoint=c.pt", *typed]).config.model
    assert model.checkpoint_key == model.checkpoint_prefix == "0."
    assert compose([*TINY, "model.checkpoint=c.pt", "model.checkpoint_prefix="]).config.model.checkpoint_prefix == ""


# ---- what is forgiven and what is not


def test_what_pytorch_fills_in_is_not_missing(tmp_path: Path) -> None:
    """Counters of old files are absent; with the version number of a new file as well."""
    whole = TinyNet()
    whole.load_state_dict(state(1))
    for versions in (False, True):
        old: Any = whole.state_dict()
        for name in [name for name in old if name.endswith("num_batches_tracked")]:
            del old[name]
        torch.save(old if versions else dict(old), tmp_path / "c.pt")
        counters = {k: v for k, v in TinyNet().state_dict().items() if "num_batches" in k}
        loads(tmp_path / "c.pt", {**state(1), **counters})


def test_modules_that_rename_what_older_files_hold(tmp_path: Path) -> None:
    """The old weight normalization into the new one; tensors of it are found although their names are not."""
    from torch.nn.utils.parametrizations import weight_norm

    net, direction = weight_norm(nn.Conv2d(3, 4, 3)), torch.rand(4, 3, 3, 3)
    torch.save(
        {"model": {"bias": torch.ones(4), "weight_g": torch.ones(4, 1, 1, 1), "weight_v": direction}}, tmp_path / "c.pt"
    )
    load_checkpoint(net, tmp_path / "c.pt")
    assert torch.allclose(net.weight, direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


def test_version_numbers_reach_modules_under_any_prefix(tmp_path: Path) -> None:
    class Versioned(nn.Linear):
        _version = 3
        seen: Any = None

        def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
            self.seen = local_metadata.get("version")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    saved, net = nn.Sequential(nn.ModuleDict({"net": nn.Sequential(Versioned(2, 2))})), nn.Sequential(Versioned(2, 2))
    torch.save({"state_dict": saved.state_dict()}, tmp_path / "c.pt")
    load_checkpoint(net, tmp_path / "c.pt")
    assert net[0].seen == 3 and torch.equal(net[0].weight, saved.get_submodule("0.net.0").weight)


def test_shared_tensors_are_saved_once(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    def tied() -> nn.Module:
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        return net

    net, other = tied(), tied()
    save_model(net, str(tmp_path / "c.safetensors"))
    load_checkpoint(other, tmp_path / "c.safetensors")
    assert weights_digest(other) == weights_digest(net)


def test_more_of_the_network_is_refused_and_more_beside_it_is_not(tmp_path: Path) -> None:
    """Further layers in a module of the network belong to another network, which would compute something else."""
    deeper = {**state(1), "block.3.weight": torch.ones(2), "projector.0.weight": torch.ones(2)}
    torch.save({"model": deeper}, tmp_path / "c.pt")
    with pytest.raises(AtlasError, match=r"1 tensor is not in the network, e\.g\. block\.3\.weight\. model\.strict=f"):
        load_checkpoint(TinyNet(), tmp_path / "c.pt")
    loads(tmp_path / "c.pt", state(1), strict=False)
    del deeper["block.3.weight"]
    torch.save({"model": deeper}, tmp_path / "c.pt")
    loads(tmp_path / "c.pt", state(1))
    torch.save({f"{i}.weight": torch.ones(2, 2) for i in range(3)}, tmp_path / "c.pt")
    with pytest.raises(AtlasError, match=r"not in the network, e\.g\. 2\.weight"):
        load_checkpoint(nn.Sequential(nn.Linear(2, 2, False), nn.Linear(2, 2, False)), tmp_path / "c.pt")


def test_another_head_says_so_and_strict_false_loads_the_rest(tmp_path: Path) -> None:
    other = {**state(1, "net."), "net.head.weight": torch.zeros(9, 8), "net.head.bias": torch.zeros(9)}
    torch.save({"state_dict": other, "optimizer": {"exp_avg": state(3)}}, tmp_path / "c.pt")
    message = (
        r"\(key 'state_dict', prefix 'net\.'\) does not fit this network: 2 tensors are of another shape, e\.g\. "
        r"head\.bias \(9,\) for \(5,\), head\.weight \(9, 8\) for \(5, 8\)\. model\.strict=false loads"
    )
    with pytest.raises(AtlasError, match=message):
        load_checkpoint(TinyNet(), tmp_path / "c.pt")
    net = TinyNet()
    before = net.head.weight.clone()
    load_checkpoint(net, tmp_path / "c.pt", strict=False)
    assert torch.equal(net.stem.weight, state(1)["stem.weight"]) and torch.equal(net.head.weight, before)


class Hidden:
    """A class of a training script."""

    def __init__(self) -> None:
        self.lr = 0.1


def test_objects_that_are_code_are_named_with_the_ways_out(tmp_path: Path) -> None:
    torch.save({"state_dict": state(1), "scheduler": Hidden()}, tmp_path / "c.pt")
    message = r"contains Python objects \(test_checkpoints\.Hidden\).*trust_checkpoint=true.*save model\.state_dict\(\)"
    with pytest.raises(AtlasError, match=message):
        load_checkpoint(TinyNet(), tmp_path / "c.pt")
    loads(tmp_path / "c.pt", state(1), trust=True)
    torch.save(torch.load(tmp_path / "c.pt", weights_only=False)["state_dict"], tmp_path / "weights.pt")
    loads(tmp_path / "weights.pt", state(1))


def test_objects_that_are_passed_over_run_no_code(tmp_path: Path) -> None:
    """An allowed name stands for something harmless, whatever the file wants it to do."""

    class Evil:
        def __reduce__(self) -> Any:
            return argparse.Namespace, ()

    torch.save({"model": state(1), "x": Evil()}, tmp_path / "c.pt")
    loads(tmp_path / "c.pt", state(1))

    class Worse:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "touched",)

    torch.save({"model": state(1), "x": Worse()}, tmp_path / "c.pt")
    with pytest.raises(AtlasError, match="can't be read as weights only"):
        load_checkpoint(TinyNet(), tmp_path / "c.pt")
    assert not (tmp_path / "touched").exists()


def test_the_search_is_not_quadratic() -> None:
    """Two networks in one file; eight times the tensors may not take 64 times as long."""

    def seconds(blocks: int) -> float:
        value = torch.zeros(1)
        own = {f"{i}.{j}.weight": value for i in range(blocks) for j in range(50)}
        entries = [Entry((key,), f"module.{name}", value) for key in ("teacher", "student") for name in own]
        times = []
        for _ in range(3):
            began = time.process_time()
            ranked = _rank_candidates(entries, own, StateDictSelector("teacher"), Path("c.pt"))
            times.append(time.process_time() - began)
        assert len(ranked[0].entries) == len(own)
        return min(times)

    assert seconds(80) < 24 * seconds(10)


# ---- ensembles


def test_an_ensemble_is_searched_by_the_same_settings(tmp_path: Path) -> None:
    two = {"teacher": state(1), "student": state(2)}
    torch.save(two, tmp_path / "two.pt")
    torch.save(state(3), tmp_path / "one.pt")
    (tmp_path / "net.py").write_text("from conftest import TinyNet\ndef build():\n    return TinyNet()\n")
    config = ModelConfig("custom", "net", target=f"{tmp_path}/net.py:build", input_size=32, checkpoint="two.pt")
    config = dataclasses.replace(config, folder=str(tmp_path), checkpoint_key="student")
    assert torch.equal(load_model(config).module.get_submodule("stem").weight, state(2)["stem.weight"])
    other = load_ensemble_member(config, _file(tmp_path / "two.pt"))
    assert torch.equal(other.module.get_submodule("stem").weight, state(2)["stem.weight"])
    with pytest.raises(AtlasError, match=r"ensemble\.checkpoints: .*one\.pt.*checkpoint_key also applies"):
        load_ensemble_member(config, _file(tmp_path / "one.pt"))
    with pytest.raises(AtlasError, match=r"two\.pt holds 2 sets"):
        load_ensemble_member(dataclasses.replace(config, checkpoint_key=None), _file(tmp_path / "two.pt"))


def _file(path: Path) -> ConfigFile:
    return ConfigFile(str(path)).read("checkpoints")


def test_a_plan_refuses_an_ensemble_that_does_not_fit(tiny_run: list[str], tmp_path: Path) -> None:
    weights = load_model(compose(tiny_run).config.model).module.state_dict()
    torch.save({"a": weights, "b": {k: v + 1 for k, v in weights.items()}}, tmp_path / "two.pt")
    torch.save({"x": torch.ones(1)}, tmp_path / "none.pt")
    ensemble = [*tiny_run, "render/augmentations=[ensemble]", "data.limit=4"]
    files = "render.augmentations.ensemble.checkpoints"
    for name, message in (("none.pt", "Not one tensor fits"), ("two.pt", r"model\.checkpoint_key=a, or model\.check")):
        with pytest.raises(AtlasError, match=message):
            make_plan(compose([*ensemble, f"{files}=[{tmp_path}/{name}]"]).config, timed=False)
    digests = set()
    for key in "ab":
        config = compose([*ensemble, f"{files}=[{tmp_path}/two.pt]", f"model.checkpoint_key={key}"]).config
        made = make_plan(config, timed=False)
        digests.add(render_digest(made.setup, made.rows[0].layer, (32, 32), config.render.name))
    assert len(digests) == 2  # other weights of the same file make other pictures


@pytest.mark.long
def test_an_ensemble_of_several_checkpoints_is_planned_and_runs(tmp_path: Path, tiny_run: list[str]) -> None:
    """The estimate times one network in the place of all members: each of its captures sees its own pass."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build():\n    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))\n"
    )
    net = load_model(ModelConfig("custom", "net", target=f"{tmp_path}/net.py:build", input_size=32)).module
    torch.save({f"{k}.{n}": v for k in ("a", "b") for n, v in net.state_dict().items()}, tmp_path / "c.pt")
    common = [o for o in tiny_run if not o.startswith(("model", "layers"))]
    run = ["run", *common, "model=custom", f"model.target={tmp_path}/net.py:build", "model.input_size=32", "layers=all"]
    run += ["layers.channels='0:1'", "data.limit=4", "render.steps=2", "render/augmentations=[ensemble]"]
    run += [f"render.augmentations.ensemble.checkpoints=[{tmp_path}/c.pt,{tmp_path}/c.pt]"]
    run += [f"model.checkpoint={tmp_path}/c.pt"]
    assert main(run) == 0


def test_values_are_those_of_the_file(tmp_path: Path) -> None:
    """A plain forward pass of the network that was saved agrees with that of the one that was loaded."""
    saved = tiny_model().module
    torch.save({"state_dict": {f"net._orig_mod.{k}": v for k, v in saved.state_dict().items()}}, tmp_path / "c.pt")
    net = TinyNet().eval()
    load_checkpoint(net, tmp_path / "c.pt")
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net(images), saved(images.clone()))
