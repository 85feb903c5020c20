"""The page of one's own image in a real browser: its numbers are those of PyTorch."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, compose
from firefox import FIREFOX, LIGHT, Firefox
from PIL import Image
from test_browser import browser as browser  # a fixture
from test_browser import nothing_serious

import pipeline
from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.data.image_loading import preprocess, read_image
from pipeline.layers.finding import capture, enumerate_layers
from pipeline.models.config import INTERPOLATIONS, Preprocessing
from pipeline.models.loading import load_model
from pipeline.site.own_image import runtime
from pipeline.site.pages import HERE

RESAMPLE = (HERE / "static/resample.js").read_text()
READY = "() => document.body.dataset.ready"


def photograph(width: int, height: int) -> Image.Image:
    """Colored noise of several scales, with full contrast."""
    rng = np.random.default_rng(width)
    image = Image.new("RGB", (width, height))
    for cells in (3, 9, 40):
        layer = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        image = Image.blend(image, layer.resize((width, height), Image.Resampling.NEAREST), 0.6)
    return image


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("source", "size", "resize", "mode"),
    [((100, 75), (32, 32), 37, "RGB"), ((31, 47), (64, 48), 64, "RGB"), ((60, 50), (40, 64), 32, "RGB"),
     ((81, 64), (24, 24), 24, "L")],
)  # fmt: skip
def test_images_are_resized_as_by_pillow(browser, interpolation, source, size, resize, mode):
    """To the bit: smaller, larger, with a crop beyond the edges, in gray."""
    image = photograph(*source)
    channels = 1 if mode == "L" else 3
    recipe = Preprocessing(size, resize, (0.5,) * channels, (0.5,) * channels, interpolation)
    wanted = preprocess(image.convert(mode), recipe)
    page = browser.new_page()
    page.evaluate(f"() => {{ window.ATLAS = {{}}; {RESAMPLE} }}")
    rgba = np.asarray(image.convert("RGBA")).reshape(-1).tolist()
    settings = {"size": size, "resize": resize, "interpolation": interpolation, "channels": channels}
    found = page.evaluate(
        "([rgba, w, h, s]) => ATLAS.resample.fitted(Uint8ClampedArray.from(rgba), w, h, s).map((p) => Array.from(p))",
        [rgba, *source, settings],
    )
    page.close()
    np.testing.assert_array_equal(np.array(found, np.uint8).reshape(wanted.shape), wanted)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> tuple[Path, list[str]]:
    """A finished small run with the page, and its overrides."""
    pytest.importorskip("onnx")
    try:
        runtime.find_files(None)
    except AtlasError as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("own")
    overrides = [*TINY, "data=folder", f"data.root={photo_folder}", f"run.root={root}", "run.name=tiny"]
    assert main(["run", *overrides, "site.own_image=true"]) == 0
    return root / "tiny", overrides


def rows_of(page: Any, layer: str) -> dict[str, list[float]]:
    """The numbers of all units of a layer on the page: activation and share of the images below it."""
    page.evaluate("delete document.body.dataset.ready")
    page.select_option("#own-layer", layer)
    page.evaluate("document.querySelector('#own-layer').dispatchEvent(new Event('change'))")
    page.wait_for_function(READY)
    values = "Array.from(li.querySelectorAll('data'), (d) => +d.value)"
    items = f"e => e.map((li) => [li.querySelector('b').textContent, {values}])"
    return dict(page.eval_on_selector_all(".own-units li", items))


def test_the_numbers_on_the_page_are_those_of_pytorch(browser, run, tmp_path):
    folder, overrides = run
    image = tmp_path / "mine.png"
    photograph(150, 110).save(image)
    page = browser.new_page(viewport={"width": 360, "height": 800})
    faults: list[str] = []
    page.on("console", lambda m: faults.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.on("request", lambda r: None if r.url.startswith(f"file://{folder}") else faults.append(r.url))
    page.goto(f"file://{folder}/site/own-image.html")
    page.wait_for_selector("#own-drop:visible")
    page.set_input_files("#own-file", str(image))
    page.wait_for_function(READY)
    model = load_model(compose(overrides).config.model)
    levels = preprocess(read_image(image, 3), model.preprocessing)
    with pipeline.open_atlas(folder) as atlas:
        layers = [layer for layer in enumerate_layers(model) if layer.name in atlas.layers]
        assert page.eval_on_selector_all("#own-layer option", "e => e.map((o) => o.value)") == list(atlas.layers)
        with capture(model, layers, stop=False) as forward, torch.no_grad():
            activations = forward(torch.from_numpy(levels)[None].float() / 255)
        for layer in atlas:
            maps = activations[layer.name][0].numpy()
            numbers, extent = rows_of(page, layer.name), float(np.ptp(maps))
            assert set(numbers) == {f"{layer.name}:{channel}" for channel in layer.channels}
            shares = [numbers[f"{layer.name}:{channel}"][1] for channel in layer.channels]
            assert [below for _, below in numbers.values()] == sorted(shares, reverse=True)
            for row, channel in enumerate(layer.channels.tolist()):
                value, below = numbers[f"{layer.name}:{channel}"]
                assert abs(value - maps[channel].max()) <= 0.01 * extent
                low, high = layer.quantiles([max(0.0, below - 1e-3), min(1.0, below + 1e-3)])[row]
                assert below in (0, 1) or low - 1e-3 * extent <= value <= high + 1e-3 * extent
    assert len(page.query_selector_all(".own-classes li")) == 5
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    nothing_serious(page, "own-image.html")
    assert "mine.png" in page.inner_text("#own-says") and not faults
    page.close()


@pytest.mark.long
def test_firefox_has_the_same_numbers(run, tmp_path):
    if FIREFOX is None:
        pytest.skip("no Firefox")
    folder, overrides = run
    image = tmp_path / "mine.png"
    photograph(150, 110).save(image)
    model = load_model(compose(overrides).config.model)
    levels = preprocess(read_image(image, 3), model.preprocessing)
    ready = """new Promise((done) => { const start = Date.now(); const look = () => {
        if (document.body.dataset.ready) done(true); else if (Date.now() - start > 30000) done(false);
        else setTimeout(look, 50); }; look(); })"""
    with pipeline.open_atlas(folder) as atlas, Firefox(tmp_path / "profile", LIGHT) as window:
        layers = [layer for layer in enumerate_layers(model) if layer.name in atlas.layers]
        with capture(model, layers, stop=False) as forward, torch.no_grad():
            activations = forward(torch.from_numpy(levels)[None].float() / 255)
        window.goto(f"file://{folder}/site/own-image.html")
        window.set_file("#own-file", image)
        assert window.evaluate(ready), window.messages
        for layer in atlas:
            maps = activations[layer.name][0].numpy()
            window.evaluate(
                f"""(() => {{ document.body.removeAttribute("data-ready");
                const menu = document.querySelector("#own-layer");
                menu.value = {json.dumps(layer.name)}; menu.dispatchEvent(new Event("change")); return true; }})()"""
            )
            assert window.evaluate(ready)
            numbers = window.evaluate(
                """Array.from(document.querySelectorAll(".own-units li"), (li) =>
                [li.querySelector("b").textContent, +li.querySelector("data").value])"""
            )
            assert {name for name, _ in numbers} == {f"{layer.name}:{channel}" for channel in layer.channels}
            for name, value in numbers:
                channel = int(name.rpartition(":")[2])
                assert abs(value - maps[channel].max()) <= 0.01 * float(np.ptp(maps))
        assert window.messages == []


def test_a_file_that_is_no_image_is_said(browser, run):
    page = browser.new_page()
    page.goto(f"file://{run[0]}/site/own-image.html")
    page.wait_for_selector("#own-drop:visible")
    page.set_input_files("#own-file", {"name": "notes.txt", "mimeType": "image/png", "buffer": b"no image"})
    page.wait_for_function(READY)
    assert "can't read notes.txt" in page.inner_text("#own-says")
    # The next one works, given by a drop.
    buffer = io.BytesIO()
    photograph(80, 80).save(buffer, "PNG")
    page.evaluate("delete document.body.dataset.ready")
    page.evaluate(
        """(bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(bytes)], "dropped.png", { type: "image/png" }));
            document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
        }""",
        list(buffer.getvalue()),
    )
    page.wait_for_function(READY)
    assert "dropped.png" in page.inner_text("#own-says")
    page.close()


def test_without_script_it_says_so(browser, run):
    window = browser.new_context(java_script_enabled=False)
    page = window.new_page()
    page.goto(f"file://{run[0]}/site/own-image.html")
    assert "needs JavaScript" in page.inner_text("main") and not page.is_visible("#own-drop")
    window.close()
