"""Images of the unit page in a real browser: enlarged, saved, linked to, printed; what marks dataset examples."""

import gzip
import io
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import test_browser
from PIL import Image
from test_browser import arrives, nothing_serious
from test_site import PHOTOS, build, write_atlas

from pipeline.site.pages import STATIC
from pipeline.store.reader import open_atlas

browser, base, visit = test_browser.browser, test_browser.base, test_browser.visit
UNIT = "blocks.1.conv:5"
ONE_BASE = pytest.mark.parametrize("base", ["disk"], indirect=True)
DIALOG, STAGE = "#lightbox", "#lightbox .lens .pic"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """As for the other tests; three crops of each image, and a failed visualization of the second preset."""
    served = tmp_path_factory.mktemp("served")
    path = write_atlas(served / "somewhere/below/atlas.h5")
    with h5py.File(path, "r+") as file:
        for name, row, value in (
            ("dataset/source", ..., np.arange(PHOTOS) // 3),
            ("layers/blocks.1.conv/render/neuron/status", (1, 1), "failed"),
            ("layers/blocks.1.conv/render/distill/status", (0, 0), "limit"),
            ("layers/blocks.1.conv/render/distill/saturation", ..., [[0.75], [0.25], [0.25]]),
            ("layers/blocks.1.conv/render/neuron/saturation", ..., 0.25),
            ("layers/blocks.1.conv/examples/maps/range", ..., [-2, 6]),
        ):
            array = file[name]
            assert isinstance(array, h5py.Dataset)
            array[row] = value
    build(path)
    return served


def unit(visit, name: str = UNIT, more: str = "", width: int = 1440):
    page = visit(f"unit.html#{name}{more}", width)
    arrives(page, name)
    return page


def focused(page) -> str:
    return page.evaluate("document.activeElement.dataset.image || document.activeElement.id")


@ONE_BASE
def test_every_image_opens_by_keyboard(visit, folder):
    page = unit(visit)
    with open_atlas(folder / "somewhere/below") as atlas:
        lists = {name: atlas["blocks.1.conv"].examples(name) for name in ("max", "mean", "min", "spectrum")}
        shown = {"max": 4, "mean": 3, "min": 3, "spectrum": 6}  # of the site's settings
        examples = sum(int((held.index[1, : shown[name]] >= 0).sum()) for name, held in lists.items() if held)
    count = 3 + examples
    page.locator(".pictures button.zoomed-by").nth(1).focus()
    page.keyboard.press("Enter")
    dialog = page.locator(DIALOG)
    assert dialog.is_visible() and page.locator(f"{DIALOG} .count").inner_text() == f"2 of {count}"
    page.keyboard.press("+")
    page.keyboard.press("+")
    assert page.evaluate("document.body.dataset.zoom") == "2.25"
    before = page.evaluate("({...ATLAS.magnifier.view})")
    page.keyboard.press("Shift+ArrowRight")
    assert page.evaluate("ATLAS.magnifier.view.left") > before["left"] + 0.05
    page.keyboard.press("-")
    page.keyboard.press("0")
    assert page.evaluate("document.body.dataset.zoom") == "1.00"
    titles = []
    for _ in range(count - 2):
        page.keyboard.press("ArrowRight")
        titles.append(page.locator("#lightbox-title").inner_text())
        assert page.locator(STAGE).evaluate("e => e.getBoundingClientRect().width") > 200
    assert titles[0].endswith("neuron, 2") and titles[1].endswith("maximum activations, 1 of 3")
    assert titles[-1].endswith("quantile examples, 6 of 6") and len(set(titles)) == count - 2
    page.keyboard.press("ArrowRight")
    assert page.locator(f"{DIALOG} .count").inner_text() == f"{count} of {count}"
    page.keyboard.press("Escape")
    assert not dialog.is_visible() and focused(page) == "visualization/neuron/1"
    assert page.evaluate("document.body.dataset.ready") == UNIT  # the arrows did not leave the unit


@ONE_BASE
@pytest.mark.long
def test_wheel_and_drag_move_the_enlarged_image(visit):
    page = unit(visit)
    page.locator(".examples button.frame").first.click()
    box = page.locator("#lightbox .lens").bounding_box()
    page.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.wheel(0, -500)
    page.wait_for_function("() => ATLAS.magnifier.view.scale > 2")
    left = page.evaluate("ATLAS.magnifier.view.left")
    assert left > 0.3  # toward the pointer
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.5 * box["height"], steps=2)
    page.mouse.up()
    assert page.evaluate("ATLAS.magnifier.view.left") < left - 0.03
    page.get_by_role("button", name="Close").last.click()
    page.wait_for_function("() => document.body.dataset.zoom === '1.00'")
    assert focused(page) == "example/max/1"


@ONE_BASE
def test_a_link_opens_an_example_with_its_heat_map_value_and_place(visit, folder):
    page = unit(visit, more="&image=example/min/2&view=heat")
    page.wait_for_selector(f"{DIALOG} canvas.heat")
    with open_atlas(folder / "somewhere/below") as atlas:
        held = atlas["blocks.1.conv"].examples("min")
        maps = atlas["blocks.1.conv"].heat_maps()
        assert held is not None and maps is not None
        value, pair = held.value[1, 1], held.map[1, 1]
        stored = maps[int(pair)]
    assert np.float32(page.locator(f"{DIALOG} dd data").first.get_attribute("value")) == value
    text = page.locator(f"{DIALOG} dl").inner_text()
    assert "minimum activation" in text and "row 0, column 7 of 8 × 8" in text
    # Fields of 30 pixels are 8 apart, the first from −15: rows −15 to 14, columns 41 to 70, partly outside the input.
    assert "columns 41–63, rows 0–14 of the input, 64 × 64 px" in text
    assert page.locator(f"{DIALOG} .ends span").all_inner_texts() == ["−2.00", "0", "6.00"]
    # Blue below zero, orange above: zero is at a quarter of the range.
    js = "c => Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)"
    colors = np.array(page.locator(f"{DIALOG} canvas.heat").evaluate(js)).reshape(-1, 4)
    values = -2 + 8 * stored.ravel().astype(float) / 255
    clear = (np.abs(values) > 0.3) & (colors[:, 3] > 5)
    assert clear.sum() > 6 and (values < -0.3).any()
    assert ((colors[:, 2] > colors[:, 0]) == (values < 0))[clear].all()
    opacity = np.argsort(np.abs(values))
    assert (np.diff(colors[opacity, 3]) >= -1).all()
    slider = page.get_by_label("Opacity of the heat map")
    slider.fill("0.4")
    assert page.locator(f"{DIALOG} canvas.heat").evaluate("c => c.style.opacity") == "0.4"
    page.keyboard.press("ArrowRight")  # the slider's own key
    assert page.locator("#lightbox-title").inner_text().endswith("minimum activations, 2 of 3")
    page.get_by_role("button", name="Copy link").last.click()
    page.locator(f"{DIALOG} .says", has_text="Copied the link").wait_for()
    # Going to another unit closes the dialog.
    page.evaluate("location.hash = '#blocks.1.conv:7'")
    arrives(page, "blocks.1.conv:7")
    assert not page.locator(DIALOG).is_visible()


def test_heat_maps_of_one_sign_use_their_whole_range(visit):
    page = unit(visit)
    color = page.evaluate("([v, low, high]) => ATLAS.pixels.heatColor(v, low, high)", [1, 1, 5])
    assert color[3] == 0
    for value, low, high, blue in ((5, 1, 5, False), (-5, -5, -1, True), (-3, -3, 6, True), (3, -6, 3, False)):
        red, _, other, alpha = page.evaluate("a => ATLAS.pixels.heatColor(...a)", [value, low, high])
        assert (other > red) == blue and alpha > 100
    equal = [page.evaluate("a => ATLAS.pixels.heatColor(...a)[3]", [v, -2, 6]) for v in (-2, 2)]
    assert equal[0] == equal[1]


@ONE_BASE
def test_saving_and_copying_from_disk_say_why_they_cannot(visit):
    page = unit(visit)
    page.locator(".examples button.frame").first.click()
    for name in ("Save PNG", "Copy image"):
        page.get_by_role("button", name=name).click()
        page.locator(f"{DIALOG} .says", has_text="A browser reads no pixels of pages from disk").wait_for()
        page.evaluate("document.querySelector('#lightbox .says').textContent = ''")


@pytest.mark.parametrize("base", ["web"], indirect=True)
def test_images_are_saved_and_copied_as_shown(visit, base, folder, tmp_path):
    page = unit(visit)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])

    def saved(name: str) -> np.ndarray:
        with page.expect_download() as download:
            page.get_by_role("button", name="Save PNG").click()
        assert download.value.suggested_filename == f"{name}.png"
        download.value.save_as(tmp_path / "saved.png")
        with Image.open(tmp_path / "saved.png") as image:
            return np.asarray(image.convert("RGB")).astype(float)

    page.locator(".pictures button.zoomed-by").first.click()
    with open_atlas(folder / "somewhere/below") as atlas:
        stored = atlas["blocks.1.conv"].image(5)
    visualization = saved("blocks.1.conv_5-distill")
    assert visualization.shape[:2] == stored.shape[:2]
    assert np.abs(visualization[24, 24] - stored[24, 24].astype(float)).max() < 12
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.locator("label[for=lightbox-whole]").click()
    whole = saved("blocks.1.conv_5-max-1")
    height, width = whole.shape[:2]
    assert width == 2 * height and width >= 512
    # The input is the right half; its upper left quarter is red, what is left of it gray.
    assert np.abs(whole[height // 4, width // 2 + width // 16] - (250, 10, 10)).max() < 25
    assert np.abs(whole[height // 4, width // 4] - 99).max() < 12
    # The frame of the receptive field: columns 41 to 63 of 64 begin at 41 / 64 of the right half.
    frame = whole[height // 8, int(width * (0.5 + 0.5 * 41 / 64)) - 3 : int(width * (0.5 + 0.5 * 41 / 64)) + 4]
    assert frame.min(1).max() > 225
    page.get_by_role("button", name="Copy image").click()
    page.locator(f"{DIALOG} .says", has_text="Copied the image").wait_for()
    kinds = page.evaluate("navigator.clipboard.read().then(all => all.flatMap(one => one.types))")
    assert kinds == ["image/png"]
    page.get_by_role("button", name="Copy link").last.click()
    page.locator(f"{DIALOG} .says", has_text="Copied the link").wait_for()
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == f"{base}unit.html#{UNIT}&image=example/max/1&view=whole"


def share(page, selector: str) -> list[float]:
    """Left, top, width and height of an element as shares of the image around it."""
    script = """e => { const [a, b] = [e, e.parentNode].map(x => x.getBoundingClientRect());
      return [(a.x - b.x) / b.width, (a.y - b.y) / b.height, a.width / b.width, a.height / b.height]; }"""
    return page.locator(selector).first.evaluate(script)


@ONE_BASE
def test_the_receptive_field_is_marked_in_every_crop(visit):
    page = unit(visit, "blocks.0.conv:20")
    page.locator(".spectrum").scroll_into_view_if_needed()
    page.wait_for_selector(".spectrum .example")
    crops = page.locator(".examples .row:not(.of-mean) .frame, .spectrum .frame")
    assert crops.count() >= 4 + 3 + 2 and page.locator(".example .frame .seen").count() == crops.count()
    # Fields of 20 pixels are 8 apart, the first from −10: columns 46 to 65, rows −10 to 9. The crop: 16 to 63, 0 to 47.
    expected = pytest.approx([30 / 48, 0, 18 / 48, 10 / 48], abs=0.02)
    for part in (".examples .of-max", ".examples .of-min", ".spectrum .row"):
        assert share(page, f"{part} >> .seen") == expected
    assert "The frame is the receptive field." in page.locator(".examples .note").first.inner_text()
    page.goto(page.url.split("#")[0] + "#stem:2")
    arrives(page, "stem:2")
    left, top, width, height = share(page, ".examples .seen.dot")
    # 3 pixels at column 15 of positions 4 apart, the first from −1: columns 59 to 61, rows −1 to 1.
    assert [left + width / 2, top + height / 2] == pytest.approx([(60.5 - 16) / 48, 1 / 48], abs=0.03)
    page.goto(page.url.split("#")[0] + "#head:1")
    arrives(page, "head:1")
    assert page.locator(".examples .frame").count() > 3 and page.locator(".examples .seen").count() == 0


@ONE_BASE
def test_highest_means_are_those_that_ratios_divide_by_and_show_the_whole_input(visit, folder):
    page = unit(visit)
    with open_atlas(folder / "somewhere/below") as atlas:
        layer = atlas["blocks.1.conv"]
        held = layer.examples("mean")
        best = layer.stats()["best_mean"][1]
    assert held is not None
    row = page.locator(".examples .of-mean")
    values = [np.float32(each.get_attribute("value")) for each in row.locator("figcaption data").all()]
    assert values == held.value[1].tolist() and values[0] == best
    assert row.locator(".seen").count() == 0
    # The input is the right half of the image, square: four quarters, the upper left one red and the upper right green.
    shown = row.locator(".frame >> nth=0").screenshot()
    pixels = np.asarray(Image.open(io.BytesIO(shown)).convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    assert abs(height - width) <= 2
    left, right = pixels[height // 4, width // 4], pixels[height // 4, width - width // 4]
    assert left[0] > 150 > left[1] and right[1] > 150 > right[0]
    row.locator(".frame >> nth=0").click()
    text = page.locator(f"{DIALOG} dl").inner_text()
    assert "mean activation" in text and "maximum at" in text and "the whole input" in text
    page.goto(page.url.split("#")[0] + "#head:1")  # a map of one position
    arrives(page, "head:1")
    assert page.locator(".examples h3").all_inner_texts() == ["Maximum activations", "Minimum activations"]


@ONE_BASE
def test_names_and_counts_of_examples(visit):
    page = unit(visit)
    assert page.locator(".examples h3").all_inner_texts() == [
        "Maximum activations", "Highest mean activations", "Minimum activations"
    ]  # fmt: skip
    note = page.locator(".examples .note").first.inner_text()
    assert "12 crops of 4 dataset images, at most one of each in a list" in note
    captions = page.locator(".pictures figcaption").all_inner_texts()
    assert "mean activation" in captions[0] and "mean activation" not in captions[1]


@ONE_BASE
def test_a_failed_visualization_of_any_preset_says_so(visit):
    page = unit(visit)
    failed = [" failed" in text for text in page.locator(".pictures figcaption").all_inner_texts()]
    assert failed == [False, False, True]
    assert page.locator(".subtitle .flag").all_inner_texts() == ["neuron failed"]
    page.goto(page.url.split("#")[0] + "#blocks.1.conv:7")
    arrives(page, "blocks.1.conv:7")
    assert page.locator(".subtitle .flag").count() == 0


@ONE_BASE
def test_a_saturated_image_and_one_that_was_still_rising_say_so(visit):
    page = unit(visit, "blocks.1.conv:2")
    assert page.locator(".subtitle .flag").all_inner_texts() == ["distill saturated"]
    assert page.locator(".provenance tbody td").first.inner_text() == "still rising at the last step"
    # Explanations are there for all readers, folded.
    page.locator(".figures summary").click()
    assert "Over all positions of all dataset images." in page.locator(".figures .meanings").inner_text()


@ONE_BASE
@pytest.mark.long
def test_printed_pages_keep_images_and_leave_out_controls(visit):
    page = unit(visit)
    page.wait_for_load_state("networkidle")
    page.emulate_media(media="print")
    for control in (".bar", ".actions", ".toggle", ".masking", ".saving", ".bins", ".neighbours"):
        assert page.locator(control).count() > 0 and not page.locator(control).first.is_visible(), control
    images = ".pictures .pic, .example .pic, .near .pic"
    kept = page.locator(images).evaluate_all("all => all.map(e => getComputedStyle(e).printColorAdjust)")
    assert len(kept) > 10 and set(kept) == {"exact"}
    # Backgrounds without the property leave no image in the file.
    assert len(re.findall(rb"/Subtype\s*/Image", page.pdf())) >= 3
    # Quantile examples load when they are visible, or printed.
    assert page.locator(".spectrum .example").count() > 0


@ONE_BASE
@pytest.mark.long
def test_the_dialog_is_accessible_and_fits_a_telephone(visit):
    page = unit(visit, more="&image=example/max/1&view=heat")
    page.wait_for_selector(f"{DIALOG} canvas.heat")
    nothing_serious(page, "lightbox")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    dialog = page.locator(DIALOG)
    assert dialog.evaluate("e => e.scrollWidth <= e.clientWidth")
    sizes = dialog.locator("button").evaluate_all("all => all.map(e => Math.min(e.offsetWidth, e.offsetHeight))")
    assert min(sizes) >= 44


def test_scripts_are_light(folder):
    static = folder / "somewhere/below/site/static"
    scripts = [static / name for name in STATIC if name.endswith(".js")]
    assert len(scripts) > 6 and sum(len(gzip.compress(path.read_bytes())) for path in scripts) <= 80_000
