"""Latents of dictionaries as units: what they compute, their files, and a dictionary of known channels."""

import dataclasses
import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, main
from safetensors.numpy import save_file

import pipeline
from pipeline.core.errors import AtlasError
from pipeline.effects.measurement import removal
from pipeline.examples.rotation import rotation_number
from pipeline.images.parameterizations import Fourier
from pipeline.images.transforms import Jitter, Scale
from pipeline.layers.circuits.paths import LinearPath
from pipeline.layers.circuits.search import find_circuits
from pipeline.layers.dictionaries import Dictionary, DictionaryLayer
from pipeline.layers.dictionary_files import METADATA, dictionary_of, read_dictionary, with_dictionaries
from pipeline.layers.finding import Layer, capture
from pipeline.layers.receptive_fields import receptive_fields
from pipeline.layers.selection import visualized_of
from pipeline.models.loading import Model
from pipeline.visualization.loop import render
from pipeline.visualization.objectives import Channel
from pipeline.visualization.optimizers import Adam
from pipeline.visualization.preset import Preset
from pipeline.visualization.render_job import RenderJob


def random_dictionary(channels: int, latents: int = 24, **settings: object) -> Dictionary:
    generator = np.random.default_rng(0)
    arrays = {
        "W_enc": generator.standard_normal((channels, latents)),
        "W_dec": generator.standard_normal((latents, channels)),
        "b_enc": generator.standard_normal(latents),
        "b_dec": generator.standard_normal(channels),
    }
    if settings.get("gate") == "jumprelu":
        arrays["threshold"] = np.abs(generator.standard_normal(latents))
    return dictionary_of(arrays, settings, "test")


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("gate", ["none", "relu", "topk", "jumprelu"])
def test_latents_are_the_gate_of_the_encoder(tiny: Model, tiny_layers: dict[str, Layer], gate: str) -> None:
    base = tiny_layers["late"]
    dictionary = random_dictionary(base.channels, gate=gate, k=3)
    layer = DictionaryLayer.on(base, "test", dictionary)
    with torch.no_grad(), capture(tiny, [base, layer]) as forward:
        maps = forward(images())
    assert maps["late@test"].shape == (3, 24, *maps["late"].shape[2:])
    x = maps["late"].permute(0, 2, 3, 1).double().numpy()
    expected = x @ dictionary.encoder.T.astype(float) + dictionary.bias
    if gate == "topk":
        least = np.sort(expected, axis=-1)[..., -3:-2]
        expected = np.where((expected >= least) & (expected > 0), expected, 0)
    elif gate == "jumprelu":
        assert dictionary.threshold is not None
        expected = np.where(expected > dictionary.threshold, expected, 0)
    elif gate == "relu":
        expected = np.maximum(expected, 0)
    np.testing.assert_allclose(maps["late@test"].permute(0, 2, 3, 1).numpy(), expected, atol=1e-4)
    assert layer.rectified is (gate != "none") and layer.channels == 24


def test_blocks_of_images_give_the_same(
    tiny: Model, tiny_layers: dict[str, Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = DictionaryLayer.on(
        tiny_layers["late"], "test", random_dictionary(tiny_layers["late"].channels, gate="relu")
    )
    with torch.no_grad(), capture(tiny, [layer]) as forward:
        complete = forward(images(5))["late@test"]
        monkeypatch.setattr("pipeline.layers.dictionaries.BLOCK_BYTES", 1)
        parts = forward(images(5))["late@test"]
    torch.testing.assert_close(parts, complete)


def test_gradients_of_the_gate_and_past_it(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    layer = DictionaryLayer.on(
        tiny_layers["late"], "test", random_dictionary(tiny_layers["late"].channels, gate="topk", k=2)
    )
    maps = torch.randn(2, tiny_layers["late"].channels, 3, 3, requires_grad=True)
    exact, ungated = layer.maps(maps, 2), layer.ungated.maps(maps, 2)
    assert torch.equal(exact, ungated)
    encoder = torch.from_numpy(layer.dictionary.encoder)  # type: ignore[union-attr]
    (gradient,) = torch.autograd.grad(exact[0, 5, 1, 1], maps, retain_graph=True)
    (past,) = torch.autograd.grad(ungated[0, 5, 1, 1], maps)
    assert torch.allclose(past[0, :, 1, 1], encoder[5])
    expected = encoder[5] if float(exact[0, 5, 1, 1].detach()) > 0 else torch.zeros_like(encoder[5])
    assert torch.allclose(gradient[0, :, 1, 1], expected)


def test_slopes_are_derivatives_along_the_decoder(tiny_layers: dict[str, Layer]) -> None:
    base = tiny_layers["late"]
    layer = DictionaryLayer.on(base, "test", random_dictionary(base.channels, gate="relu"))
    maps = torch.randn(1, base.channels, 3, 3, dtype=torch.float32, requires_grad=True)
    weights = torch.randn(1, base.channels, 3, 3)
    (gradient,) = torch.autograd.grad((maps**2 * weights).sum(), maps)
    decoder = torch.from_numpy(layer.dictionary.decoder)  # type: ignore[union-attr]
    moved = maps.detach().double().clone()
    moved[0, :, 2, 0] += 1e-5 * decoder[7].double()
    change = ((moved**2 - maps.detach().double() ** 2) * weights).sum() / 1e-5
    assert float(layer.slopes(gradient, 1)[0, 7, 2, 0]) == pytest.approx(float(change), rel=1e-3)


def test_removing_a_latent_takes_its_part_of_the_map_away(tiny_layers: dict[str, Layer]) -> None:
    base = tiny_layers["late"]
    layer = DictionaryLayer.on(base, "test", random_dictionary(base.channels, gate="relu"))
    maps = torch.randn(1, base.channels, 3, 3)
    latents = layer.maps(maps, 1)[0]
    changed = removal(layer, (4, 9), np.array([0.0, 2.5], np.float32))(maps.expand(2, *maps.shape[1:]))
    decoder = torch.from_numpy(layer.dictionary.decoder)  # type: ignore[union-attr]
    for copy, (channel, value) in enumerate(((4, 0.0), (9, 2.5))):
        expected = maps[0] + decoder[channel, :, None, None] * (value - latents[channel])
        torch.testing.assert_close(changed[copy], expected)


def known_channels(base: Layer, channels: list[int]) -> Dictionary:
    rows = np.zeros((len(channels), base.channels), np.float32)
    rows[range(len(channels)), channels] = 1
    return dictionary_of({"directions": rows}, {}, "test")


def test_a_dictionary_of_channels_has_their_visualizations(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    """The same seed, which follows from name and number of the unit, gives the same image."""
    base = tiny_layers["late"]
    preset = Preset(
        name="test",
        objective=Channel(),
        canvas=Fourier(decay=1.0),
        transforms=(Jitter(2), Scale(0.9, 1.1)),
        optimizer=Adam(lr=0.1),
        steps=12,
        size=32,
        margin=4,
    )
    latents = DictionaryLayer.on(base, "known", known_channels(base, list(range(base.channels))))
    units = [(channel, 0) for channel in range(base.channels)]
    expected = render(RenderJob(tiny, base, preset, seed=0), units)
    images = render(RenderJob(tiny, dataclasses.replace(latents, name=base.name), preset, seed=0), units)
    for image, channel in zip(images, expected, strict=True):
        assert image.seed == channel.seed and np.array_equal(image.image, channel.image)
        assert image.activation == pytest.approx(channel.activation, rel=1e-6)


def test_connections_of_known_channels(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    stem, base, head = (tiny_layers[name] for name in ("stem", "late", "head"))
    latents = DictionaryLayer.on(base, "known", known_channels(base, [5, 2, 7]))
    whole = next(weights for _, weights in LinearPath(tiny, base, head).weights(range(5)))
    found = next(weights for _, weights in LinearPath(tiny, latents, head).weights(range(5)))
    np.testing.assert_allclose(found.sum, whole.sum[:, [5, 2, 7]], rtol=1e-4, atol=1e-6)
    chosen = [(stem, range(stem.channels)), (base, range(base.channels)), (latents, range(3)), (head, range(5))]
    inputs, outputs = find_circuits(tiny, chosen)
    assert inputs["late@known"].layer == "stem" and outputs["late@known"].layer == "head"
    np.testing.assert_allclose(inputs["late@known"].norm, inputs["late"].norm[[5, 2, 7]], rtol=1e-3)
    # Channels keep the connections that they have without the dictionary.
    without = find_circuits(tiny, [chosen[0], chosen[1], chosen[3]])
    for plain, all_connections in zip(without, (inputs, outputs), strict=True):
        for name, connections in plain.items():
            np.testing.assert_array_equal(all_connections[name].channel, connections.channel)


def test_receptive_fields_are_those_of_the_layer(tiny: Model, tiny_layers: dict[str, Layer]) -> None:
    layer = DictionaryLayer.on(
        tiny_layers["stem"], "test", random_dictionary(tiny_layers["stem"].channels, gate="topk", k=1)
    )
    fields = receptive_fields(tiny, [layer, tiny_layers["stem"]])
    assert fields["stem@test"] == fields["stem"] is not None


def test_rotation_number_of_latents_compares_with_directions_of_the_layer() -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal((400, 32))
    values[:, :16] = np.where(generator.random((400, 16)) < 0.02, 8.0, 0.0)
    mixed = values @ np.linalg.qr(generator.standard_normal((32, 32)))[0]
    rows = generator.standard_normal((600, 32))
    assert rotation_number(mixed, 0, rows) < 0.12  # random directions are not special, whatever gate follows
    inverse = np.linalg.lstsq(mixed, values, rcond=None)[0].T
    assert rotation_number(mixed, 0, inverse[:16]) > 0.9


# Files


def saved(folder: Path, arrays: dict[str, np.ndarray], settings: dict[str, object] | None = None) -> Path:
    metadata = {METADATA: json.dumps(settings)} if settings else None
    save_file({name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}, folder, metadata)
    return folder


ARRAYS = {
    "W_enc": np.arange(12).reshape(3, 4) / 10,
    "W_dec": np.arange(12).reshape(4, 3) / 7,
    "b_enc": np.arange(4) / 5,
    "b_dec": np.arange(3) / 3,
}


def test_files_of_saelens_and_saev(tmp_path: Path) -> None:
    saelens = tmp_path / "sae"
    saelens.mkdir()
    saved(saelens / "sae_weights.safetensors", ARRAYS)
    config = {"architecture": "topk", "k": 2, "d_in": 3, "d_sae": 4, "apply_b_dec_to_input": True}
    (saelens / "cfg.json").write_text(json.dumps(config))
    read = read_dictionary(saelens, "test")
    assert (read.gate, read.k, read.latents, read.channels) == ("topk", 2, 4, 3)
    np.testing.assert_allclose(read.bias, ARRAYS["b_enc"] - ARRAYS["b_dec"] @ ARRAYS["W_enc"], rtol=1e-6)

    (saelens / "cfg.json").write_text(json.dumps({**config, "normalize_activations": "layer_norm"}))
    with pytest.raises(AtlasError, match="layer_norm is not supported"):
        read_dictionary(saelens, "test")
    (saelens / "cfg.json").write_text(json.dumps({**config, "architecture": "gated"}))
    with pytest.raises(AtlasError, match="'gated' is not supported"):
        read_dictionary(saelens, "test")

    saev = tmp_path / "sae.pt"
    header = {"schema": 2, "cfg": {"activation": {"cls": "TopK", "params": {"top_k": 3}}}}
    content = io.BytesIO()
    torch.save({name: torch.from_numpy(array).float() for name, array in ARRAYS.items()}, content)
    saev.write_bytes(json.dumps(header).encode() + b"\n" + content.getvalue())
    read = read_dictionary(saev, "test")
    assert (read.gate, read.k) == ("topk", 3)
    np.testing.assert_allclose(read.bias, ARRAYS["b_enc"], rtol=1e-6)


def test_nothing_of_a_file_is_executed(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "sae.pt"
    path.write_bytes(
        b'{"schema": 2, "cfg": {"activation": {"cls": "Relu", "params": {}}}}\n' + pickle.dumps(Harm(), protocol=2)
    )
    with pytest.raises(AtlasError, match="is not a dictionary"):
        read_dictionary(path, "test")
    np.save(tmp_path / "sae.npy", np.array([Harm()], object), allow_pickle=True)
    with pytest.raises(AtlasError, match="is not a dictionary"):
        read_dictionary(tmp_path / "sae.npy", "test")
    assert not (tmp_path / "executed").exists()


def test_gates_of_plain_files(tmp_path: Path) -> None:
    assert read_dictionary(saved(tmp_path / "a.safetensors", ARRAYS), "test").gate == "relu"
    assert read_dictionary(saved(tmp_path / "b.safetensors", ARRAYS, {"gate": "topk", "k": 2}), "test").k == 2
    batch = read_dictionary(
        saved(tmp_path / "c.safetensors", {**ARRAYS, "threshold": np.array(0.3)}, {"gate": "batchtopk", "k": 2}), "test"
    )
    assert batch.gate == "jumprelu" and batch.threshold is not None and batch.threshold.shape == (4,)
    plain = read_dictionary(saved(tmp_path / "d.safetensors", {"directions": np.ones((9, 3))}), "test")
    assert (plain.gate, plain.latents, plain.channels) == ("none", 9, 3)
    np.save(tmp_path / "e.npy", np.ones(3))
    assert read_dictionary(tmp_path / "e.npy", "test").latents == 1


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        ({"W_enc": np.ones((3, 4))}, {}, "it has no W_enc and W_dec"),
        ({"W_enc": np.ones((4, 3)), "W_dec": np.ones((4, 3))}, {}, "must be of the shapes"),
        ({**ARRAYS, "b_enc": np.ones(3)}, {}, r"b_enc \(3,\) must be of the shape \(4,\)"),
        ({**ARRAYS, "b_dec": np.full(3, np.nan)}, {}, "not finite"),
        (ARRAYS, {"gate": "topk", "k": 9}, "k=9 must be from 1 to the number of latents, 4"),
        (ARRAYS, {"gate": "gated"}, "'gated' is not supported"),
        (ARRAYS, {"gate": "jumprelu"}, "needs the array threshold"),
    ],
)
def test_bad_files_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(AtlasError, match=message):
        read_dictionary(saved(tmp_path / "sae.safetensors", arrays, settings), "layers.dictionary=x")


def test_bad_specifications_are_refused(tiny_layers: dict[str, Layer], tmp_path: Path) -> None:
    layers = list(tiny_layers.values())
    np.save(tmp_path / "three.npy", np.ones((2, 3)))
    np.save(tmp_path / "sae.npy", np.ones((2, tiny_layers["late"].channels)))
    for specification, message in (
        ("sae.npy", "write FILE@LAYER"),
        (f"{tmp_path}/sae.npy@lat", "there is no layer 'lat'.*late"),
        (f"{tmp_path}/none.npy@late", "can't be read: No such file"),
        (f"{tmp_path}/sae.txt@late", "must be a .safetensors, .npy or .pt file"),
        (f"{tmp_path}/three.npy@late", f"latents are of 3 channels, and late has {tiny_layers['late'].channels}"),
    ):
        with pytest.raises(AtlasError, match=message):
            with_dictionaries(layers, [specification])
    with pytest.raises(AtlasError, match="two dictionaries late@sae"):
        with_dictionaries(layers, [f"{tmp_path}/sae.npy@late"] * 2)


# A whole run


@pytest.mark.long
@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_a_whole_run(engine: str, tmp_path: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples and statistics of latents that are known channels are those of the channels."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    rows = np.zeros((3, 64), np.float32)
    rows[range(3), [5, 2, 7]] = 1
    np.save(tmp_path / "known.npy", rows)
    overrides = [*TINY, "data=folder", f"data.root={photo_folder}", f"run.root={tmp_path}", "run.name=latents"]
    overrides += [
        f"layers.dictionary={tmp_path}/known.npy@blocks.1.0.conv_exp",
        "layers.include=[blocks.1.0.conv_exp*,classifier]",
    ]
    overrides += ["layers.channels='0:8'", "effects.images=6", "effects.ablated=2", f"engine={engine}"]
    assert main(["run", *overrides]) == 0
    with pipeline.open_atlas(tmp_path / "latents") as atlas:
        base, latents = atlas["blocks.1.0.conv_exp"], atlas["blocks.1.0.conv_exp@known"]
        assert latents.kind == "dictionary" and latents.total_channels == 3
        places = [list(base.channels).index(c) for c in (5, 2, 7)]
        for name in ("max", "mean", "min"):
            ours, theirs = latents.examples(name), base.examples(name)
            assert ours is not None and theirs is not None
            np.testing.assert_array_equal(ours.index, theirs.index[places])
        units = atlas.units()
        for key in ("max", "mean", "sd", "min", "best_mean"):
            table = units.set_index(["layer", "channel"])[key]
            ours, theirs = (
                [float(table[name, c]) for c in chosen]
                for name, chosen in ((latents.name, range(3)), (base.name, (5, 2, 7)))
            )
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    written = (tmp_path / "latents" / "atlas.h5").stat().st_mtime_ns
    assert main(["run", *overrides]) == 0
    assert (tmp_path / "latents" / "atlas.h5").stat().st_mtime_ns == written
    assert main(["verify", f"{tmp_path}/latents", "run.trust=true"]) == 0


@pytest.mark.long
def test_some_latents_are_visualized_and_all_have_examples(tmp_path: Path, photo_folder: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    np.save(tmp_path / "many.npy", rows)
    layer = "blocks.1.0.conv_exp@many"
    overrides = [*TINY, "data=folder", f"data.root={photo_folder}", f"run.root={tmp_path}", "run.name=latents"]
    overrides += [
        f"layers.dictionary={tmp_path}/many.npy@blocks.1.0.conv_exp",
        f"layers.include=['{layer}',classifier]",
    ]
    overrides += ["layers.channels=all", "layers.visualized=spread:3"]
    assert main(["run", *overrides]) == 0
    with pipeline.open_atlas(tmp_path / "latents") as atlas:
        latents = atlas[layer]
        assert len(latents.channels) == 40
        examples, numbers = latents.examples("max"), latents.measurements()
        assert examples is not None and (examples.index[:, 0] >= 0).all()
        visualized = np.flatnonzero((numbers["status"] != "missing").all(1))
        assert visualized.tolist() == np.flatnonzero(latents.visualized).tolist() == [6, 20, 33]
        assert np.isfinite(numbers["transfer"][visualized]).all() and np.isnan(numbers["transfer"][0]).all()
        activations = latents.image_activations()
        assert activations is not None and activations.shape == (40, 1, 40)
        assert np.isfinite(activations[visualized]).all() and np.isnan(activations[0]).all()
    assert main(["verify", f"{tmp_path}/latents", "run.trust=true"]) == 0
    # The site does not call those missing that were not selected.
    grid = next((tmp_path / "latents" / "site" / "data").glob("*many/grid.js")).read_text()
    assert grid.count('"unselected"') == 37 and '"missing"' not in grid
    units = json.loads(next((tmp_path / "latents/site/api/v1/units").glob("*many.json")).read_text())["units"]
    assert [unit["channel"] for unit in units if any(unit["pictures"].values())] == [6, 20, 33]
    written = (tmp_path / "latents" / "atlas.h5").stat().st_mtime_ns
    assert main(["run", *overrides]) == 0
    assert (tmp_path / "latents" / "atlas.h5").stat().st_mtime_ns == written
    # More of them: what exists is kept.
    assert main(["run", *overrides, "layers.visualized=[6,7,20,33]", "run.update=true"]) == 0
    with pipeline.open_atlas(tmp_path / "latents") as atlas:
        status = atlas[layer].measurements()["status"]
        assert np.flatnonzero((status != "missing").all(1)).tolist() == [6, 7, 20, 33]


def test_which_channels_are_visualized(tiny_layers: dict[str, Layer]) -> None:
    layer = tiny_layers["late"]
    assert visualized_of(layer, (1, 3, 5, 7), "all") == (1, 3, 5, 7)
    assert visualized_of(layer, (1, 3, 5, 7), "spread:2") == (3, 7)
    assert visualized_of(layer, (1, 3, 5, 7), "0:4") == (1, 3)
    assert visualized_of(layer, (1, 3, 5, 7), (0, 5)) == (5,)
    with pytest.raises(AtlasError, match=r"layers\.visualized='some'"):
        visualized_of(layer, (1, 3), "some")
