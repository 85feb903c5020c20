"""The compare site in a real browser, from disk and from a sub-folder of a web host."""

import re
from pathlib import Path
from typing import Any

import pytest
import test_browser
from test_browser import nothing_serious
from test_compare import change
from test_site import LAYERS, SMALL, write_atlas

from pipeline.compare import open_runs
from pipeline.compare.build import build

browser, base, visit = test_browser.browser, test_browser.base, test_browser.visit

HOSTILE = "<img src=x onerror=alert(7)>"
HOME, EVEN, UNIT = "index.html", "layers/blocks.0.conv.html", "unit.html#blocks.0.conv:20"
COUNT = sum(len(layer[3]) for layer in LAYERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a web host would serve; the site of two runs, one with a hostile name, is in `somewhere/below/site`."""
    served, runs = tmp_path_factory.mktemp("served"), tmp_path_factory.mktemp("runs")
    for name, seed in (("one", 0), (HOSTILE, 90)):
        (runs / name).mkdir()
        write_atlas(runs / name / "atlas.h5", seed=seed)
    change(runs / "one" / "atlas.h5", "stem", "distill", activation=[1, 2, 3, 4, 5, 6])
    change(runs / HOSTILE / "atlas.h5", "stem", "distill", activation=[2, 2, 1, 9, 6, 700])
    with open_runs(["one", HOSTILE], [], runs) as inputs:
        (served / "somewhere/below").mkdir(parents=True)
        build(inputs, served / "somewhere/below/site", SMALL)
    return served


def home(visit, width: int = 1440, to: str = HOME) -> Any:
    """The first page, when its grid is there."""
    page = visit(to, width)
    page.wait_for_function("() => document.body?.dataset.ready")
    return page


def names(page: Any) -> list[str]:
    """Units of the grid, in order."""
    return page.eval_on_selector_all(".tile", "all => all.map(e => e.dataset.name)")


def ordered(page: Any, by: str, of: str) -> list[str]:
    """Units of the grid in another order."""
    page.locator("#of").select_option(of)
    page.locator("#by").select_option(by)
    page.wait_for_function("said => document.body?.dataset.ready?.startsWith(said)", arg=f"{by} {of} ")
    return names(page)


def arrives(page: Any, name: str) -> None:
    page.wait_for_function("name => document.body?.dataset.ready === name", arg=name)
    assert page.locator("article.compared").get_attribute("data-unit-shown") == name


# From a host the pages are those of the atlas's own site in their loading, which the default tests open from both.
LOADED = [("disk", 360), *(pytest.param(*at, marks=pytest.mark.long) for at in (("web", 1440), ("disk", 1440)))]


@pytest.mark.parametrize(("base", "width"), LOADED, indirect=["base"])
@pytest.mark.long
def test_everything_fits_and_loads(visit, base, width):
    for to in (HOME, EVEN, UNIT, "unit.html#../../x:1", "unit.html#blocks.1.conv:5"):
        page = home(visit, width, to)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), to
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
            assert min(ground) > 200 if scheme == "light" else max(ground) < 60
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        page.wait_for_timeout(60)
        page.context.close()


@pytest.mark.long
@pytest.mark.parametrize("base", ["disk"], indirect=True)
def test_axe_finds_nothing_serious(visit, base):
    for to in (HOME, EVEN, UNIT):
        page = home(visit, to=to)
        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        nothing_serious(page, to)
        page.context.close()


def test_order_and_filter(visit):
    page = home(visit)
    assert len(names(page)) == COUNT
    # The second is another preset, whose activation means another thing.
    assert ordered(page, "up", "activation")[0] == "stem:0"
    page.locator("#b").select_option("2")
    page.wait_for_url("**#by=up&of=activation&b=2")
    assert ordered(page, "up", "activation")[:2] == ["stem:5", "stem:3"]
    assert ordered(page, "down", "activation")[0] == "stem:2"
    assert ordered(page, "spread", "activation")[:3] == ["stem:5", "stem:3", "stem:2"]
    assert set(ordered(page, "unlike", "mean_ratio")[:6]) == {f"stem:{c}" for c in range(6)}
    channels = [int(n.rpartition(":")[2]) for n in ordered(page, "channel", "peak_ratio")]
    assert channels == sorted(channels)
    assert ordered(page, "layer", "peak_ratio")[:7] == [*(f"stem:{c}" for c in range(6)), "blocks.0.conv:0"]
    page.locator("#in").select_option("head")
    page.wait_for_function("() => document.body?.dataset.ready?.endsWith(' 5')")
    assert names(page) == [f"head:{c}" for c in range(5)]
    page.get_by_label("Find").fill("goldfish")
    page.wait_for_function("() => document.body?.dataset.ready?.endsWith(' 1')")
    assert page.locator("#count").inner_text() == "1 of 5"
    assert page.url.endswith("#by=layer&b=2&in=head")
    page.get_by_label("Find").fill("")
    page.reload()
    page.wait_for_function("() => document.body?.dataset.ready === 'layer peak_ratio 5'")
    assert len(page.locator(".tile").first.locator(".pic").all()) == 4  # two runs with two presets each


def test_an_order_may_change_while_its_values_load(visit):
    page = home(visit)
    listed = page.evaluate("""async () => {
      const asked = ATLAS.order.parse(""), listed = ATLAS.order.list(asked);
      asked.by = "unlike";
      return (await listed).map((unit) => unit.layer.name + ":" + ATLAS.channelAt(unit.layer, unit.row));
    }""")
    assert listed == names(page)


def test_arrows_follow_the_order_of_the_grid(visit, base):
    page = home(visit, to="index.html#by=spread&of=activation&b=2")
    order = names(page)
    assert order[0] == "stem:5"
    page.locator(".tile").first.click()
    arrives(page, "stem:5")
    assert page.url == base + "unit.html#stem:5&of=activation&b=2"
    for key, name in (("Right", order[1]), ("Right", order[2]), ("Left", order[1]), ("Down", None), ("Up", None)):
        page.keyboard.press("Arrow" + key)
        if name:
            arrives(page, name)
        else:
            page.wait_for_function(
                "key => document.body?.dataset.ready?.startsWith(key)", arg="stem" if key == "Up" else "b"
            )
    page.get_by_role("link", name="all units").click()
    page.wait_for_url("**/index.html#of=activation&b=2")
    page.wait_for_function("() => document.body?.dataset.ready")
    assert names(page) == order


def test_a_unit_shows_all_pictures_and_numbers(visit):
    page = visit("unit.html#stem:5")
    arrives(page, "stem:5")
    labels = page.locator(".sides figure:not(.swipe) figcaption b").all_inner_texts()
    assert labels == ["one/distill", "one/neuron", f"{HOSTILE}/distill", f"{HOSTILE}/neuron"]
    # Only blocks.1.conv was drawn by neuron.
    assert page.locator(".sides .absent").count() == 2 and page.locator(".sides .lens").count() == 2
    page.locator("#side-b").select_option("2") if page.locator("#side-b").count() else None
    row = page.locator("tr", has=page.get_by_role("rowheader", name=re.compile(r"^activation(?! ratio)")))
    assert row.locator("data").all_inner_texts()[:2] == ["6.00", "700"]
    assert "best" in row.locator("td").nth(2).inner_text()
    page = visit("unit.html#blocks.1.conv:5")
    arrives(page, "blocks.1.conv:5")
    assert page.locator(".sides .lens").count() == 5
    backgrounds = "all => all.map(e => e.style.backgroundPosition)"
    before = page.eval_on_selector_all(".sides .pic", backgrounds)
    page.get_by_text("visualization 2", exact=True).click()
    assert page.locator(".sides figure:not(.swipe) .lens").count() == 2  # distill made one picture, neuron two
    assert page.eval_on_selector_all(".sides .pic", backgrounds) != before


def transforms(page: Any) -> set[str]:
    return set(page.eval_on_selector_all(".lens .pic", "all => all.map(e => e.style.transform)"))


def test_zoom_is_the_same_everywhere(visit):
    page = visit("unit.html#blocks.1.conv:5&b=2")
    arrives(page, "blocks.1.conv:5")
    whole = transforms(page)
    assert len(whole) == 1 and page.locator("body").get_attribute("data-zoom") == "1.00"
    box = page.locator(".lens").nth(1).bounding_box()
    x, y = box["x"] + box["width"] / 4, box["y"] + box["height"] / 4
    page.mouse.move(x, y)
    page.mouse.wheel(0, -600)
    page.wait_for_function("() => Number(document.body?.dataset.zoom) > 3")
    near = transforms(page)
    assert len(near) == 1 and near != whole
    assert page.evaluate("scrollY") == 0
    # What was under the pointer is there still, in every picture: a quarter of it, from the left and from above.
    seen = page.evaluate("[ATLAS.magnifier.view.left, ATLAS.magnifier.view.top, ATLAS.magnifier.view.scale]")
    assert seen[0] + 0.25 / seen[2] == pytest.approx(0.25, abs=0.01) and seen[1] == pytest.approx(seen[0], abs=0.01)
    page.mouse.down()
    page.mouse.move(x - 40, y - 10, steps=3)
    page.mouse.up()
    moved = transforms(page)
    assert len(moved) == 1 and moved != near
    assert page.evaluate("ATLAS.magnifier.view.left") == pytest.approx(seen[0] + 40 / box["width"] / seen[2], abs=0.01)
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => (document.body?.dataset.ready ?? 'blocks.1.conv:5') !== 'blocks.1.conv:5'")
    assert transforms(page) <= moved  # the next unit shows the same part
    page.keyboard.press("0")
    assert transforms(page) <= whole
    page.get_by_role("button", name="Zoom in").click()
    assert page.locator("body").get_attribute("data-zoom") == "1.50"
    page.keyboard.press("-")
    assert page.locator("body").get_attribute("data-zoom") == "1.00"


def test_two_fingers_zoom(visit):
    page = visit("unit.html#blocks.1.conv:5&b=2")
    arrives(page, "blocks.1.conv:5")
    page.evaluate(
        """() => {
          const lens = document.querySelector(".lens"), box = lens.getBoundingClientRect();
          lens.setPointerCapture = () => {};
          const send = (type, id, x) => lens.dispatchEvent(new PointerEvent(type, { pointerId: id, bubbles: true,
            clientX: box.left + x * box.width, clientY: box.top + box.height / 2 }));
          send("pointerdown", 1, 0.4); send("pointerdown", 2, 0.6);
          send("pointermove", 1, 0.3); send("pointermove", 2, 0.7);
          send("pointerup", 1, 0.3); send("pointerup", 2, 0.7);
        }"""
    )
    assert page.evaluate("ATLAS.magnifier.view.scale") == pytest.approx(2, abs=0.01)
    assert page.evaluate("ATLAS.magnifier.view.left") == pytest.approx(0.25, abs=0.03)
    assert len(transforms(page)) == 1


def test_swipe(visit):
    page = visit("unit.html#blocks.1.conv:5&b=2")
    arrives(page, "blocks.1.conv:5")
    cut = "document.querySelector('.over').style.clipPath"
    assert page.evaluate(cut) == "inset(0px 0px 0px 50%)"
    slider = page.get_by_label("Swipe between")
    slider.fill("20")
    assert page.evaluate(cut) == "inset(0px 0px 0px 20%)"
    page.keyboard.press("Escape")
    page.locator("h1").click()
    page.keyboard.press(".")
    assert page.evaluate(cut) == "inset(0px 0px 0px 25%)" and slider.input_value() == "25"
    stage, divider = (page.locator(s).bounding_box() for s in (".stage", ".divider"))
    page.mouse.move(divider["x"] + 13, stage["y"] + stage["height"] / 2)
    page.mouse.down()
    page.mouse.move(stage["x"] + 0.75 * stage["width"], stage["y"] + 20, steps=4)
    page.mouse.up()
    assert slider.input_value() == "75" and page.locator("body").get_attribute("data-zoom") == "1.00"
    page.locator("#side-b").select_option("3")
    page.wait_for_url("**#blocks.1.conv:5&b=3")
    page.wait_for_function("() => document.activeElement.id === 'side-b'")
    assert page.get_by_label("Swipe between one/distill and " + HOSTILE + "/neuron").count() == 1


def test_plots_lead_to_units_and_layers(visit, base):
    page = home(visit)
    page.locator(".plot.wide a").nth(1).click()
    page.wait_for_url(base + EVEN)
    page.wait_for_function("() => document.body?.dataset.ready")
    assert len(names(page)) == len(LAYERS[1][3])
    page.locator(".plot a circle").first.dispatch_event("click")
    page.wait_for_url("**/unit.html#blocks.0.conv:*")
    page.wait_for_function("() => document.body?.dataset.ready?.startsWith('blocks.0.conv:')")


def test_search_knows_units(visit, base):
    page = home(visit)
    page.keyboard.press("/")
    page.keyboard.type("0.conv:38")
    page.wait_for_selector("#results [role=option]")
    assert page.get_by_text("on the map").count() == 0
    page.keyboard.press("Enter")
    arrives(page, "blocks.0.conv:38")
    page.keyboard.press("m")
    page.keyboard.press("c")
    assert page.url.startswith(base + "unit.html#blocks.0.conv:38")
    page.goto(base + "unit.html#blocks.0.conv:3")
    page.get_by_text("blocks.0.conv has no channel 3 in this comparison.").wait_for()
    page.goto(base + "unit.html#<img src=x onerror=alert(4)>:1")
    page.get_by_text("This comparison has no such unit.").wait_for()


def test_without_script_there_are_numbers_and_plots(visit):
    page = visit(HOME, script=False)
    assert page.locator("table").count() >= 4 and page.locator(".plot svg").count() >= 1
    assert "compare.csv" in page.locator("noscript").inner_text() and not page.locator(".controls").is_visible()


def test_the_first_page_begins_with_the_main_measure(visit):
    page = home(visit)
    rows = page.locator("#numbers tbody tr").filter(visible=True)
    ratios = rows.count()
    assert ratios == 1  # of four contenders, all six pairs are among the other measures
    contenders = page.locator(".contenders li").all_inner_texts()
    assert len(contenders) == 4 and contenders[0].startswith("one/distill: run ") and "preset distill" in contenders[0]
    page.get_by_text("All measures", exact=True).click()
    assert rows.count() > ratios + 5
    # All visualizations have the same number of steps, and no interval around it.
    steps = page.locator("#numbers details tr").filter(has=page.get_by_role("rowheader", name=re.compile("^steps")))
    assert steps.first.locator("data").first.inner_text() == "512" and steps.first.locator(".interval").count() == 0
