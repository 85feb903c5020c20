"""Several presets in one run: the same pictures as in runs of their own, side by side in one atlas."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, compose
from test_examples import seen_by
from test_run import shard_times

import pipeline
from pipeline.cli.main import main
from pipeline.core import metric_specs
from pipeline.data import datasets
from pipeline.layers.finding import capture, enumerate_layers
from pipeline.models.loading import load_model
from pipeline.store.reader import SCHEMA_VERSION

ALSO = "also=[negative,image_prior,diverse]"
SMALL = [f"also.{name}.{key}" for name in ("negative", "image_prior", "diverse") for key in ("steps=3", "size=32")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Path:
    """A run with four presets, and one of `negative` alone."""
    root = tmp_path_factory.mktemp("presets")
    layers = [o for o in TINY if not o.startswith("layers.include")]
    base = [*layers, "layers.include=[conv_stem,conv_head]", "data=folder", f"data.root={photo_folder}",
            f"run.root={root}"]  # fmt: skip
    assert main(["run", *base, ALSO, *SMALL, "also.diverse.variants=2", "run.name=many"]) == 0
    single = [o for o in base if not o.startswith("render.margin")]
    alone = [*single, "render=negative", "render.steps=3", "render.margin=24", "run.name=alone"]
    assert main(["render", *alone]) == 0
    return root


def test_all_presets_are_in_one_atlas_in_their_order(folders: Path) -> None:
    with pipeline.open_atlas(folders / "many") as atlas:
        assert atlas.attributes["schema_version"] == SCHEMA_VERSION
        layer = atlas["conv_stem"]
        assert layer.presets == ("distill", "negative", "image_prior", "diverse")
        assert layer.images().shape == (3, 1, 32, 32, 3) and layer.images("diverse").shape == (3, 2, 32, 32, 3)
        later = atlas["conv_head"]
        assert [later.render_attributes(p)["natural"] for p in layer.presets] == ["mean", "least", "mean", "mean"]
        assert {later.render_attributes(p)["objective"] for p in layer.presets} == {"channel"}
        table = atlas.units()
        counts = table.groupby("preset").size().to_dict()
        assert counts == {"distill": 6, "negative": 6, "image_prior": 6, "diverse": 12}
        assert table["status"].ne("missing").all()


def test_a_first_convolution_has_kernels_and_energies_and_no_ratio(folders: Path) -> None:
    with pipeline.open_atlas(folders / "many") as atlas:
        layer = atlas["conv_stem"]
        objectives = [str(layer.render_attributes(preset)["objective"]) for preset in layer.presets]
        assert objectives == ["energy", "channel", "energy", "energy"]
        assert layer.render_attributes("distill")["natural"] == ""
        assert layer.render_attributes("distill")["budget_names"] == ["l2"]
        numbers = layer.measurements("distill")
        assert np.isnan(numbers["peak_ratio"]).all() and np.isnan(numbers["mean_ratio"]).all()
        assert np.isfinite(layer.measurements("negative")["mean_ratio"]).any()
        kernels = layer.kernels()
        assert kernels is not None and kernels.shape == (3, 3, 3, 3) and layer.has_exact_kernels
        assert atlas["conv_head"].kernels() is None
    page = (folders / "many" / "site" / "layers" / "conv_stem.html").read_text()
    assert page.count('class="kernel"') == 3 and "objective energy" in page
    assert 'class="kernel"' not in (folders / "many" / "site" / "layers" / "conv_head.html").read_text()
    units = json.loads((folders / "many" / "site" / "api" / "v1" / "units" / "conv_stem.json").read_text())["units"]
    assert all(unit["kernel"]["size"] == [3, 3] and len(unit["kernel"]["views"]) == 4 for unit in units)
    assert [unit["kernel"]["scale"] for unit in units] == pytest.approx(np.abs(kernels).max((1, 2, 3)), rel=1e-3)
    plan = pd.read_csv(folders / "many" / "plan.csv").dropna(subset="layer")
    assert plan.set_index(["layer", "preset"])["objective"]["conv_stem"].tolist() == objectives


def test_pictures_are_measured_and_held_against_photographs(folders: Path) -> None:
    with pipeline.open_atlas(folders / "many") as atlas:
        table = atlas.units()
        for metric in (*metric_specs.IMAGE_METRICS, *metric_specs.RELATION_METRICS):
            values = table[metric.name]
            if metric.name.startswith(("peak", "spatial_mean", "transfer", "margin", "path_")):
                assert values[table["objective"] == "energy"].isna().all()
                values = values[table["objective"] != "energy"]
            if metric.name in ("agreement", "depth_agreement"):
                values = values[table["preset"] == "diverse"]
            if metric.name == "depth_agreement":  # there is no depth before the first layer
                values = values[table["layer"] != "conv_stem"]
            if metric.name == "margin":  # of maxima
                values = values[table["preset"] != "negative"]
            if metric.name == "path_ratio":  # only where the examples are more alike than random images
                values = values.dropna()
            assert values.between(metric.low - 1e-3, metric.high + 1e-3).all(), metric.name
        assert table["agreement"].notna().sum() == 12
        sign = np.where(table["preset"] == "negative", -1, 1)
        mean, peak = (
            table[high].where(sign > 0, table[low]) for high, low in (("best_mean", "least_mean"), ("max", "min"))
        )
        for ratio, own, best in (("mean_ratio", "spatial_mean", mean), ("peak_ratio", "peak", peak)):
            expected = table[own] / best.where(best * sign > 0)
            assert np.allclose(table[ratio], expected, equal_nan=True) and expected.notna().any()
        means = table[table["objective"] != "energy"]
        assert np.allclose(means["spatial_mean"], means["activation"], atol=1e-3)
        whole = table["activation"].where(table["activation"] * sign > 0)
        assert np.allclose(table["robust_share"], table["robust"] / whole, equal_nan=True)


def test_transfer_is_that_of_a_pass_over_the_best_photographs(folders: Path, photo_folder: Path) -> None:
    base = [o for o in TINY if not o.startswith("layers.include")]
    config = compose([*base, "data=folder", f"data.root={photo_folder}"]).config
    model, dataset = load_model(config.model).to("cpu"), datasets.list_dataset(config.data)
    with pipeline.open_atlas(folders / "many") as atlas:
        for view in atlas:
            layer = next(la for la in enumerate_layers(model) if la.name == view.name)
            answers = seen_by(model, [layer], dataset, 4)[layer.name].max((2, 3))
            for preset, which in (("distill", "max"), ("negative", "min")):
                if view.render_attributes(preset)["objective"] == "energy":  # the examples have high activations
                    assert not {"transfer", "margin", "path_ratio"} & view.measurements(preset).keys()
                    continue
                best, own = view.examples(which), view.image_activations(preset)
                assert best is not None and own is not None and own.shape == (3, 1, layer.channels)
                for row, index in enumerate(best.index):
                    others = (np.arange(layer.channels) != view.channels[row]) & (answers.std(0) > 1e-6)
                    mean, sd = answers.mean(0)[others], answers.std(0, ddof=1)[others]
                    a, b = (own[row, 0][others] - mean) / sd, (answers[index].mean(0)[others] - mean) / sd
                    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                    numbers = view.measurements(preset)
                    assert numbers["transfer"][row, 0] == pytest.approx(cosine, abs=5e-3)
                    assert -1 <= numbers["transfer_floor"][row, 0] <= 1


def test_path_similarity_is_that_of_plain_passes(folders: Path, photo_folder: Path) -> None:
    """Through hooks on the unmodified network, from the stored images; the run folds and lowers it."""
    base = [o for o in TINY if not o.startswith("layers.include")]
    config = compose([*base, "data=folder", f"data.root={photo_folder}"]).config
    model, dataset = load_model(config.model).to("cpu"), datasets.list_dataset(config.data)
    layers = {layer.name: layer for layer in enumerate_layers(model)}
    with pipeline.open_atlas(folders / "many") as atlas:
        assert atlas.depths == ("blocks.1.0", "blocks.2.0", "blocks.3.0", "blocks.4.0")
        for view in atlas:
            path = [layers[name] for name in atlas.depths if view.name == "conv_head"] + [layers[view.name]]
            seen = {name: maps.mean((2, 3)) for name, maps in seen_by(model, path, dataset, 4).items()}
            for preset, which in (("distill", "mean"), ("negative", "min")):
                curves, best = view.path_curves(preset), view.examples(which)
                if view.render_attributes(preset)["objective"] == "energy":
                    assert curves is None
                    continue
                assert curves is not None and best is not None
                assert curves.layers == tuple(layer.name for layer in path)
                images = torch.from_numpy(view.images(preset)[:, 0]).permute(0, 3, 1, 2).float() / 255
                with torch.no_grad(), capture(model, path) as forward:
                    found = {name: maps.mean((2, 3)).numpy() for name, maps in forward(images).items()}
                for d, layer in enumerate(path):
                    mean, sd = seen[layer.name].mean(0), seen[layer.name].std(0, ddof=1)
                    for row, channel in enumerate(view.channels):
                        kept = sd > 1e-3 * np.median(sd)
                        if layer.name == view.name:
                            kept[channel] = False
                        z = (np.stack([found[layer.name][row], *seen[layer.name][best.index[row]]]) - mean) / sd
                        z = z[:, kept] / np.linalg.norm(z[:, kept], axis=1, keepdims=True)
                        cosines = z @ z.T
                        assert curves.similarity[row, 0, d] == pytest.approx(cosines[0, 1:].mean(), abs=0.02)
                        pairs = cosines[1:, 1:][np.triu_indices(len(z) - 1, 1)]
                        assert curves.natural[row, d] == pytest.approx(pairs.mean(), abs=0.02)
                numbers = view.measurements(preset)
                assert np.allclose(numbers["path_similarity"][:, 0], curves.similarity[:, 0].mean(1), atol=1e-5)
                ratio = numbers["path_similarity"] / numbers["path_natural"]
                known = np.isfinite(numbers["path_ratio"])
                assert np.allclose(numbers["path_ratio"][known], ratio[known], atol=1e-5)


def test_a_preset_among_others_gives_the_same_pictures_as_alone(folders: Path) -> None:
    with pipeline.open_atlas(folders / "many") as many, pipeline.open_atlas(folders / "alone") as alone:
        for layer in alone:
            other = many[layer.name]
            assert layer.presets == ("negative",)
            assert np.array_equal(layer.images()[()], other.images("negative")[()])
            assert layer.render_attributes()["digest"] == other.render_attributes("negative")["digest"]
            assert np.array_equal(layer.measurements()["seed"], other.measurements("negative")["seed"])


def test_it_is_whole_and_nothing_is_made_again(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = folders / "many"
    times = shard_times(many)
    assert main(["verify", str(many), "run.check=3", "run.trust=true"]) == 0
    assert main(["compact", str(many)]) == 0
    assert len(shard_times(many)) < len(times)
    settings = (many / "config.yaml").read_text()
    assert "also:" in settings and "also:" not in (folders / "alone" / "config.yaml").read_text()
    capsys.readouterr()
    assert main(["verify", str(many), "run.check=0"]) == 0


def test_what_can_not_go_together_is_refused(tiny_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for more, told in (
        (["also=[distill]"], "Two presets of this run are called 'distill'"),
        (["also=[nothing]"], "There is no render=nothing"),
        (["also=[negative]", "also.negative.size=8"], "also.negative.size=8"),
        (["also=[negative]", "also.negative.steps=0"], "also.negative.steps=0 is too small"),
        (["also=[oygard]"], "also=oygard: render.schedule: head@blocks"),
        (["also=[negative]", "render/objective@also.negative.objective=layer"], "into a separate run"),
    ):
        assert main(["plan", *tiny_run, *more]) == 2, more
        assert told in capsys.readouterr().err, more


def test_the_plan_tells_each_preset(tiny_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *tiny_run, "also=[negative,diverse]"]) == 0
    printed = capsys.readouterr().out
    assert "negative: 15 visualizations" in printed and "diverse: 60 visualizations" in printed
    assert "15 units" in printed
