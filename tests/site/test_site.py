"""The site without a browser: files, links, numbers, hostile names, and builds that are cut short."""

import base64
import contextlib
import csv
import dataclasses
import gzip
import http.client
import io
import itertools
import json
import os
import re
import shlex
import socket
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import h5py
import jsonschema
import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.activation_atlas.projection import principal_components
from pipeline.core.errors import AtlasError
from pipeline.core.metric_specs import IMAGE_METRICS, METRICS, RATIO_METRICS, RELATION_METRICS
from pipeline.judges.judgement import NUMBERS, RANGES
from pipeline.judges.ridge import MIN_CORRELATION
from pipeline.site import number_format as v
from pipeline.site import output
from pipeline.site.build import build_site
from pipeline.site.config import SiteConfig
from pipeline.site.context import families, method
from pipeline.site.context.layer_summary import summarize
from pipeline.site.data import api, js_shards
from pipeline.site.hosting import hosts, serve
from pipeline.site.hosting.serve import server
from pipeline.site.layout import embedding
from pipeline.site.media import size_budget
from pipeline.site.media.chunks import Chunk, choose_showing
from pipeline.site.pages import HERE, STATIC
from pipeline.store.hdf5 import create_file, write_array
from pipeline.store.layer_view import Stack
from pipeline.store.reader import open_atlas
from pipeline.store.shards import safe_name

SIDE = 64
PHOTOS = 12
LABELS = ("tench", "goldfish", "<img src=x onerror=alert(1)>", "hen & cock", 'the "quoted" owl')
HOSTILE_PATH = "a\"b'c/<script>alert(2)</script>.jpg"
# name, kind, channels in the network, channels in the atlas, map, receptive field, picture side and depth
LAYERS = (
    ("stem", "conv", 6, (0, 1, 2, 3, 4, 5), 16, 3, 32, 3),
    ("blocks.0.conv", "conv", 40, tuple(range(0, 40, 2)), 8, 20, 48, 3),
    ("blocks.1.conv", "conv", 9, (2, 5, 7), 8, 30, 48, 1),
    ("../../x", "block", 4, (0, 1, 2, 3), 4, 0, 64, 3),
    ("head", "linear", len(LABELS), tuple(range(len(LABELS))), 1, 0, 64, 3),
)
SMALL = SiteConfig(example_px=32, examples=4, thumb_px=48, picture_px=64, photo_px=64)
EDGES = (0, 25, 75, 100)
FAMILIES = """
families:
  - name: Even <b>ones</b>
    comment: Channels that two divides & no more.
    source: https://distill.pub/2020/circuits/
    units:
      - blocks.0.conv:2
      - {unit: "../../x:1", comment: "<img src=x onerror=alert(9)>"}
      - blocks.0.conv:3
      - gone:7
"""


def photo_of(index: int) -> np.ndarray:
    """Four quarters of different colours, (SIDE, SIDE, 3)."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    half = SIDE // 2
    image[:half, :half] = (250, 10, 10)
    image[:half, half:] = (10, 250, 10)
    image[half:, :half] = (10, 10, 250)
    image[half:, half:] = 15 * index
    return image


def write_atlas(path: Path, pictures: bool = True, examples: bool = True, layers=LAYERS, seed: int = 0) -> Path:
    """A small atlas with hostile names, a failed and a silent unit, two objectives and two variants.

    `seed` changes the pictures of stem and nothing else.
    """
    rng = np.random.default_rng(0)
    with create_file(path) as file:
        file.attrs.update(
            schema="neuron-atlas", schema_version=5, model="tiny", weights_sha256="ab" * 32,
            dataset_fingerprint="cd" * 32, versions=json.dumps({"torch": "9.9", "numpy": "8.8"}),
            created="2026-01-02T03:04:05+00:00", run="test", failures=1, identity="ef" * 32,
        )  # fmt: skip
        file.create_group("layers")
        transforms = "    jitter: {pixels: 8}\n    rotate: {degrees: 10.0}"
        file.create_dataset(
            "provenance/config",
            data="model: tiny\nname: '</pre><script>alert(3)</script>'\nrender:\n  name: distill\n  objective: {name: "
            f"channel}}\n  canvas: {{name: fourier, decay: 1.25}}\n  transforms:\n{transforms}\n  steps: 128\n",
        )
        write_array(file, "model/labels", np.array(LABELS, object))
        for order, layer in enumerate(layers):
            write_layer(file, rng, order, layer, pictures, examples, seed if layer[0] == "stem" else 0)
        if examples:
            write_photos(file)
    if examples:
        write_people(path.parent / "names.csv", layers)
    return path


def write_people(path: Path, layers=LAYERS) -> None:
    """Names by two authors, as hostile as the labels; the first unit of a layer has one that is not earned."""
    rows = [["unit", "name", "author", "confidence", "comment"]]
    for name, _, _, channels, *_ in layers[1:]:
        for i, channel in enumerate(channels):
            unit, word = f"{name}:{channel}", LABELS[i % len(LABELS)]
            rows.append(
                [unit, word, "Ada <b>L.</b>", "0.75" if i else "0.25", "<script>alert(5)</script>" if i == 1 else ""]
            )
            if i == 1:
                rows.append([unit, "a second name", "=Charles", "", ""])
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows(rows)


def write_layer(file: h5py.File, rng, order: int, layer, pictures: bool, examples: bool, seed: int) -> None:
    name, kind, total, channels, side, field, size, depth = layer
    group = file.create_group(f"layers/{safe_name(name)}")
    stride = SIDE // side
    group.attrs.update(
        name=name, order=order, kind=kind, channels=total, map_height=side, map_width=side,
        receptive_field=[field] * 2, receptive_field_stride=[stride] * 2,
        receptive_field_offset=[-(field // 2)] * 2, input_size=[SIDE] * 2,
    )  # fmt: skip
    write_array(group, "channels", np.array(channels, np.int32))
    best = rng.uniform(1, 9, len(channels)).astype(np.float32)
    if examples:
        if name == "stem":
            best[3] = -0.5
        write_examples(group, rng, name, len(channels), side, best)
    for number, (preset, variants) in enumerate((("distill", 1), ("neuron", 2)) if pictures else ()):
        if preset == "neuron" and name != "blocks.1.conv":
            continue
        render = f"render/{preset}"
        shape = (len(channels), variants)
        colours = rng.integers(0, 255, (*shape, 1, 1, depth))
        images = np.broadcast_to((colours + seed) % 256, (*shape, size, size, depth)).astype(np.uint8)
        write_array(group, f"{render}/images", images)
        for key in ("activation", "robust", "start", "seconds"):
            write_array(group, f"{render}/{key}", rng.normal(3, 1, shape).astype(np.float32))
        if name != "stem":  # which is as in an atlas of before there were measures
            judged = np.random.default_rng(order)
            for metric in (*IMAGE_METRICS, *RELATION_METRICS):
                low = max(metric.low, -3)
                values = judged.uniform(low, min(metric.high, low + 9), shape).astype(metric.dtype)
                alone = metric.name == "agreement" and variants == 1
                write_array(group, f"{render}/{metric.name}", np.full_like(values, np.nan) if alone else values)
        write_array(group, f"{render}/seed", rng.integers(2**53, 2**62, shape))
        write_array(group, f"{render}/steps", np.full(shape, 512, np.int32))
        write_array(group, f"{render}/trace", np.sort(rng.normal(0, 1, (*shape, 16))).astype(np.float32))
        if name == "blocks.1.conv":
            write_judgements(group, render, shape)
            # The left half is transparent, and the more so the lower the row.
            steps = np.linspace(0, 100, shape[0] * shape[1]).reshape(*shape, 1, 1)
            write_array(group, f"{render}/mask", np.where(np.arange(size) < size // 2, steps, 255).astype(np.uint8)
                        * np.ones((size, 1), np.uint8))  # fmt: skip
        status = np.full(shape, "converged", object)
        if name == "blocks.0.conv":
            status[1] = "failed"
        write_array(group, f"{render}/status", status)
        natural, objective = ("max", "neuron") if number else ("mean", "channel")
        group[render].attrs.update(
            natural=natural,
            objective=objective,
            preset=preset,
            digest=f"{order}f" * 32,
            order=number,
            precision="bfloat16 float32" if order else "float32",
        )


def write_judgements(group: h5py.Group, render: str, shape: tuple[int, int]) -> None:
    """Numbers of two judges; the first unit has no matching direction in the second."""
    rng = np.random.default_rng(5)
    for judge, kind in (("other <net>", "class"), ("second", "unit")):
        numbers = {name: rng.uniform(max(RANGES[name][0], -3), 1, shape) for name in NUMBERS[kind]}
        if kind == "class":
            numbers["rank"] = rng.integers(1, 9, shape)
        else:
            numbers["correlation"] = rng.uniform(MIN_CORRELATION, 1, shape)
            numbers["correlation"][0], numbers["quantile"][0], numbers["deviations"][0] = 0.1, np.nan, np.nan
        for name, values in numbers.items():
            write_array(group, f"{render}/judges/{safe_name(judge)}/{name}", values.astype(np.float32))
        attributes = {"judge": judge, "kind": kind, "weights_sha256": "12" * 32}
        group[f"{render}/judges/{safe_name(judge)}"].attrs.update(attributes)


def write_examples(group: h5py.Group, rng, name: str, count: int, side: int, best: np.ndarray) -> None:
    """Lists, heat-maps, statistics, histograms, responses and labels of one layer."""
    largest = best * np.where(best > 0, 2, 0.5).astype(np.float32)
    lists = {"max": 5, "min": 3, "spectrum": 2 * (len(EDGES) - 1), "mean": 3}
    first = 0
    each = sum(lists.values())
    for key, k in lists.items():
        where = f"examples/{key}"
        top = best if key == "mean" else largest
        write_array(group, f"{where}/value", (top[:, None] - np.arange(k) * 0.1).astype(np.float32))
        index = np.stack([rng.permutation(PHOTOS)[:k] for _ in range(count)] or [np.zeros(k)]).astype(np.int32)[:count]
        if key == "max":
            index[:, 3:] = np.where(np.arange(count)[:, None] % 2, -1, index[:, 3:])
        write_array(group, f"{where}/index", index)
        write_array(group, f"{where}/y", np.zeros((count, k), np.int32))
        write_array(group, f"{where}/x", np.full((count, k), side - 1, np.int32))
        pair = np.arange(count)[:, None] * each + first + np.arange(k)
        write_array(group, f"{where}/map", np.where(index >= 0, pair, -1).astype(np.int32))
        first += k
    group["examples/spectrum"].attrs["edges"] = np.array(EDGES, float)
    write_array(group, "examples/maps/value", rng.integers(0, 256, (count * each, 3, 4), np.uint8))
    write_array(group, "examples/maps/range", np.sort(rng.normal(0, 1, (count * each, 2))).astype(np.float32))
    for key, value in (("mean", best * -0.1), ("max", largest), ("best_mean", best), ("sparsity", best / 10)):
        write_array(group, f"stats/{key}", value.astype(np.float32))
    write_array(group, "stats/nonzero", rng.uniform(0, 1, count).astype(np.float32))
    write_array(group, "stats/inactive", largest <= 0)
    write_array(group, "histogram/counts", rng.integers(0, 50, (count, 256)).astype(np.int32))
    write_array(group, "histogram/range", np.stack([np.full(count, -1), largest], 1).astype(np.float32))
    write_array(group, "histogram/ends", np.stack([np.full(count, -1.5), largest], 1).astype(np.float32))
    write_array(group, "responses", rng.normal(0, 1, (count, 8)).astype(np.float16))
    over = np.full((count, 3), -1, np.int32)
    over[:, 0] = np.arange(count) % len(LABELS)
    write_array(group, "labels/over", over)
    # One source image of the first unit has its label, which is too few to name it.
    counts = np.where(np.arange(count)[:, None] == 0, 1, 4)
    write_array(group, "labels/count", np.where(over >= 0, counts, 0).astype(np.int32))
    write_array(group, "labels/lift", np.where(over >= 0, 2.5, np.nan).astype(np.float32))
    write_array(group, "labels/p", np.where(over >= 0, 0.25, np.nan).astype(np.float32))
    write_array(group, "labels/best", over[:, 0].copy())
    for key in ("selectivity", "auroc"):
        write_array(group, f"labels/{key}", rng.uniform(0, 1, count).astype(np.float32))
    group["labels"].attrs["method"] = "responses"
    if name == "blocks.0.conv":
        write_array(group, "wiring/inputs/channel", np.tile(np.array([[5, 0, -1]], np.int32), (count, 1)))
        write_array(group, "wiring/inputs/norm", np.tile(np.array([[2.5, 0.5, 0]], np.float32), (count, 1)))
        write_array(group, "wiring/inputs/sum", np.tile(np.array([[-1.5, 0.25, 0]], np.float32), (count, 1)))
        write_array(group, "wiring/inputs/strength", np.tile(np.array([[1.25, 0.75, 0]], np.float32), (count, 1)))
        group["wiring/inputs"].attrs["layer"] = "stem"
        group["wiring/inputs"].attrs["scale"] = "sd"
        group["wiring/inputs"].attrs["approximate"] = "blocks.0.norm\nblocks.0.conv"
    if name == "stem":
        write_path_connections(group, count)


def write_path_connections(group: h5py.Group, count: int) -> None:
    """Outputs of the units of the first layer, with everything that a linear path has."""
    kernel = np.arange(-4, 5, dtype=np.float16).reshape(3, 3)
    columns = {
        "channel": np.array([[20, 4, -1]], np.int32),
        "norm": np.array([[2.5, 0.5, 0]], np.float32),
        "sum": np.array([[1.5, -0.25, 0]], np.float32),
        "strength": np.array([[1.25, 0.75, 0]], np.float32),
        "kernel": np.stack([kernel, -kernel, 0 * kernel])[None],
        "residual": np.array([[1.25, 0.5, 0]], np.float32),
        "attribution": np.array([[0.5, np.nan, np.nan]], np.float32),
    }
    for key, values in columns.items():
        write_array(group, f"wiring/outputs/{key}", np.repeat(values, count, 0))
    attributes = {"layer": "blocks.0.conv", "scale": "sd", "approximate": "", "linearized": True}
    attributes |= {"path": "a.expand\na.project", "bypassed": "a.expand", "gated": "a.act"}
    group["wiring/outputs"].attrs.update(attributes)
    write_array(group, "attributed/outputs/channel", np.repeat(np.array([[4, -1]], np.int32), count, 0))
    write_array(group, "attributed/outputs/value", np.repeat(np.array([[-0.75, 0]], np.float32), count, 0))
    group["attributed/outputs"].attrs.update({"layer": "blocks.0.conv", "images": 12})


def write_photos(file: h5py.File) -> None:
    paths = [f"val/{i:03d}.jpg" for i in range(PHOTOS)]
    paths[1] = HOSTILE_PATH
    write_array(file, "dataset/path", np.array(paths, object))
    write_array(file, "dataset/label", np.array([LABELS[i % len(LABELS)] for i in range(PHOTOS)], object))
    write_array(file, "dataset/source", np.arange(PHOTOS))
    write_array(file, "dataset/labels", np.array(LABELS, object))
    write_array(file, "dataset/responses", np.arange(8, dtype=np.int32))
    blobs = []
    for i in range(PHOTOS):
        buffer = io.BytesIO()
        # The input is the right part of the source picture: what is left of it is grey.
        wide = np.full((SIDE, 2 * SIDE, 3), 99, np.uint8)
        wide[:, SIDE:] = photo_of(i)
        Image.fromarray(wide).save(buffer, "JPEG", quality=95, subsampling=0)
        blobs.append(buffer.getvalue())
    write_array(file, "dataset/shown/index", np.arange(PHOTOS, dtype=np.int32))
    write_array(file, "dataset/shown/size", np.tile(np.array([[4 * SIDE, 2 * SIDE]], np.int32), (PHOTOS, 1)))
    box = np.array([[2 * SIDE, 0, 4 * SIDE, 2 * SIDE]], np.float32)
    write_array(file, "dataset/shown/box", np.tile(box, (PHOTOS, 1)))
    write_array(file, "dataset/shown/offset", np.cumsum([0, *map(len, blobs)]))
    write_array(file, "dataset/shown/jpeg", np.frombuffer(b"".join(blobs), np.uint8))
    file["dataset/shown"].attrs["store"] = "images"


def build(path: Path, folder: Path | None = None, config: SiteConfig = SMALL):
    with open_atlas(path) as atlas:
        return build_site(atlas, folder or path.parent / "site", config)


class Page(HTMLParser):
    """Elements of a page as (tag, attributes), and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += " " + data

    @property
    def plain(self) -> str:
        return " ".join(self.words.split())

    @property
    def ids(self) -> set[str]:
        return {a["id"] for _, a in self.elements if a.get("id")}  # type: ignore[misc]

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag]


def pages_of(site: Path) -> dict[Path, Page]:
    return {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    path = write_atlas(tmp_path_factory.mktemp("run") / "atlas.h5")
    (path.parent / "families.yaml").write_text(FAMILIES)
    build(path)
    return path.parent / "site"


def layer_page(site: Path, name: str) -> Page:
    return Page(site / "layers" / f"{safe_name(name)}.html")


def shard(site: Path, name: str):
    """What a shard registers, under the name that it must."""
    text = (site / "data" / f"{name}.js").read_text(encoding="ascii")
    found = re.fullmatch(r"ATLAS\.put\((\"[^\"]*\"),(.*)\);\n", text, re.DOTALL)
    assert found and json.loads(found[1]) == name and "<" not in text
    return json.loads(found[2])


def unit_of(site: Path, layer, channel: int):
    """A unit's record, as its page finds it, with its photographs."""
    row = layer.row(channel)
    per = shard(site, "index")["sizes"]["shard"]
    found = shard(site, f"{safe_name(layer.name)}/u{row - row % per}")
    return found["units"][row % per], found["photos"]


def check_links(site: Path) -> int:
    """Every link and source is a file of the site; every anchor exists. Their number."""
    pages, count = pages_of(site), 0
    known = {layer[0] for layer in LAYERS}
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for tag, attributes in page.elements:
            for key in ("href", "src"):
                link = attributes.get(key)
                if link is None or attributes.get("rel") == "noreferrer noopener":
                    continue
                parts = urllib.parse.urlsplit(link)
                assert not parts.scheme and not parts.netloc, (path, tag, link)
                target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
                assert target.is_file(), (path, tag, link)
                assert site.resolve() in target.parents, (path, link)
                if target.name == "unit.html" and parts.path:
                    layer, _, channel = urllib.parse.unquote(parts.fragment).rpartition(":")
                    assert layer in known and channel.isdigit(), link
                elif parts.fragment:
                    assert parts.fragment in pages[target].ids, (path, link)
                count += 1
    return count


def test_links_lead_somewhere(site):
    assert check_links(site) > 100


def test_ids_are_unique(site):
    for page in pages_of(site).values():
        ids = [a["id"] for _, a in page.elements if a.get("id")]
        assert len(ids) == len(set(ids)), page.path


def test_report_counts_what_is_there(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    heard = []
    with open_atlas(path) as atlas:
        report = build_site(atlas, tmp_path / "site", SMALL, lambda done, total: heard.append((done, total)))
        table = atlas.units()
        units = sum(len(layer.channels) for layer in atlas)
    files = [p for p in (tmp_path / "site").rglob("*") if p.is_file()]
    assert report.files == len(files)
    assert report.bytes == sum(p.stat().st_size for p in files)
    assert (report.layers, report.units, report.pictures) == (len(LAYERS), units, len(table))
    assert heard[0] == (0, units) and heard[-1] == (units, units) and heard == sorted(heard)
    assert report.host.largest_file == max(p.stat().st_size for p in files)
    lines = report.host.lines()
    assert f"{len(files):,} files" in lines[0] and sum("yes" in line for line in lines) == 5


def test_numbers_are_those_of_the_store(site):
    """Every number that a unit's page shows, to the last digit, and the same in the API."""
    with open_atlas(site.parent) as atlas:
        for layer in atlas:
            stats, labels, maps = layer.stats(), layer.labels(), layer.heat_maps()
            found = json.loads((site / f"api/v1/units/{safe_name(layer.name)}.json").read_text())
            assert (found["layer"], found["of"], len(found["units"])) == (
                layer.name, layer.total_channels, len(layer.channels)
            )  # fmt: skip
            facts, grid = (shard(site, f"{safe_name(layer.name)}/{name}") for name in ("layer", "grid"))
            for row, channel in enumerate(layer.channels.tolist()):
                unit, photos = unit_of(site, layer, channel)
                answer = found["units"][row]
                # The API has the addresses of the unit's page and images besides.
                assert unit == {k: v for k, v in answer.items() if k in unit} and unit["channel"] == channel
                assert answer.keys() - unit.keys() == ({"page", "images"} if layer.presets else {"page"})
                for key, array in stats.items():
                    assert unit["stats"][key] == array[row].item() or np.float32(unit["stats"][key]) == array[row]
                for key in layer.presets:
                    numbers, natural = layer.measurements(key), layer.dataset_max(key)[row]
                    for variant, picture in enumerate(unit["pictures"][key]):
                        for name in ("activation", "robust", "start", "seconds"):
                            assert np.float32(picture[name]) == numbers[name][row, variant]
                        judgements = {one.judge: one.numbers for one in layer.judgements(key)}
                        assert picture.get("judges", {}).keys() == judgements.keys()
                        for judge, by_name in judgements.items():
                            for name, values in by_name.items():
                                number, value = picture["judges"][judge][name], values[row, variant]
                                assert number is None if np.isnan(value) else np.float32(number) == value
                        judged = {m.name for m in (*RATIO_METRICS, *IMAGE_METRICS, *RELATION_METRICS)}
                        for name in judged & numbers.keys():
                            value = numbers[name][row, variant]
                            assert picture[name] is None if np.isnan(value) else np.float32(picture[name]) == value
                        assert ("transfer" in picture) == (layer.name != "stem")
                        assert np.float32(picture["natural"]) == natural
                        assert picture["seed"] == str(numbers["seed"][row, variant])
                        assert picture["steps"] == numbers["steps"][row, variant]
                        assert picture["status"] == numbers["status"][row, variant]
                main = unit["pictures"]["distill"][0]
                for name in ("transfer", "margin", "checkerboard"):
                    column = grid.get(name)
                    assert (column is None) == (layer.name == "stem")
                    assert column is None or column[row] == pytest.approx(main[name], rel=1e-3)
                assert "agreement" not in grid
                ratio = grid["ratio"][row]
                # The stem is as in an older atlas, which has no peaks.
                own, best = ("spatial_mean", "best_mean") if layer.name == "stem" else ("peak", "max")
                if stats[best][row] > 0:
                    assert ratio == pytest.approx(main[own] / stats[best][row], rel=1e-3)
                else:
                    assert ratio is None
                for name, most in (("max", 4), ("min", 3), ("spectrum", 6)):
                    held = layer.examples(name)
                    assert held is not None
                    index = [i for i in held.index[row].tolist() if i >= 0][:most]
                    entries = unit["examples"][name]
                    assert [e[1] for e in entries] == index[: len(entries)] and len(entries) == min(most, len(index))
                    for place, entry in enumerate(entries):
                        assert np.float32(entry[0]) == held.value[row, place]
                        assert entry[2:5] == [a[row, place] for a in (held.y, held.x, held.map)]
                        box = layer.crop_box(entry[2], entry[3])
                        assert tuple(entry[6:]) == (box or ()) or facts["whole"]
                        assert photos[str(entry[1])][:2] == list(atlas.dataset()[["path", "label"]].iloc[entry[1]])
                assert labels is not None and maps is not None
                label = atlas.dataset_labels[labels.over[row, 0]]
                assert unit["labels"]["over"][0] == [label, 1 if row == 0 else 4, 2.5, 0.25]
                # The stem sees 3 pixels, which no label is about.
                named = [one["name"] for one in unit.get("names", ()) if one["earned"]]
                assert named == ([] if row == 0 or layer.name == "stem" else [label, *["a second name"] * (row == 1)])
                if layer.name == "stem":
                    assert "label" not in grid
                elif layer.name != "head":  # its units are classes
                    assert (grid["label"][row] < 0) == (row == 0)
                assert sum(unit["histogram"]["counts"]) == layer.histogram().counts[row].sum()
                quantiles = layer.quantiles([e / 100 for e in EDGES])[row]
                assert unit["histogram"]["quantiles"] == pytest.approx(quantiles.tolist(), rel=1e-4)
            heat = shard(site, f"{safe_name(layer.name)}/h0")
            pair = unit_of(site, layer, layer.channels[0])[0]["examples"]["max"][0][4]
            low, high, coded = heat["maps"][str(pair)]
            assert np.array_equal(np.frombuffer(base64.b64decode(coded), np.uint8), maps[pair].ravel())
            assert [np.float32(low), np.float32(high)] == layer.heat_ranges()[pair].tolist()


def test_wiring_is_that_of_the_store(site):
    with open_atlas(site.parent) as atlas:
        unit, _ = unit_of(site, atlas["blocks.0.conv"], 4)
        ranks = [unit_of(site, atlas["stem"], channel)[0]["tiny"] for channel in (5, 0)]
    units = [[5, 2.5, -1.5, ranks[0], 1.25], [0, 0.5, 0.25, ranks[1], 0.75]]
    approximate = ["blocks.0.norm", "blocks.0.conv"]
    assert unit["wiring"] == {"inputs": {"layer": "stem", "scale": "sd", "units": units, "approximate": approximate}}


def test_connections_along_a_path_are_those_of_the_store(site):
    with open_atlas(site.parent) as atlas:
        unit, _ = unit_of(site, atlas["stem"], 1)
        places = [unit_of(site, atlas["blocks.0.conv"], channel)[0]["tiny"] for channel in (20, 4)]
    found = unit["wiring"]["outputs"]
    assert found["units"] == [[20, 2.5, 1.5, places[0], 1.25], [4, 0.5, -0.25, places[1], 0.75]]
    assert (found["path"], found["bypassed"], found["gated"]) == (["a.expand", "a.project"], ["a.expand"], ["a.act"])
    assert found["linearized"] and found["residual"] == [1.25, 0.5] and found["attribution"] == [0.5, None]
    assert found["kernels"]["size"] == [3, 3] and len(found["kernels"]["values"]) == 2
    first = np.frombuffer(base64.b64decode(found["kernels"]["values"][0]), np.uint8)
    assert first.tolist() == [1, 33, 64, 96, 128, 160, 192, 223, 255]
    attributed = {"layer": "blocks.0.conv", "images": 12, "units": [[4, places[1], -0.75]]}
    assert unit["attributed"] == {"outputs": attributed}


def test_an_atlas_without_connections_has_no_page_of_circuits(site, tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    with h5py.File(path, "r+") as file:
        found: list[str] = []
        file.visit(found.append)
        for name in found:
            if name.endswith(("/wiring", "/attributed")):
                del file[name]
    build(path, tmp_path / "plain")
    assert not (tmp_path / "plain/circuit.html").exists() and (site / "circuit.html").is_file()


def test_layers_say_what_judges_say(site):
    with open_atlas(site.parent) as atlas:
        first = {one.judge: one.numbers for one in atlas["blocks.1.conv"].judgements()}
    rank, quantile = first["other <net>"]["rank"], first["second"]["quantile"]
    text = layer_page(site, "blocks.1.conv").plain
    assert f"recognized by other <net>: rank 1 for {(rank == 1).sum()} of {rank.size}, median rank" in text
    assert f"{np.isfinite(quantile).sum()} of {quantile.size} visualizations with a matching direction" in text
    assert "recognized by" not in layer_page(site, "stem").plain


def test_api_keeps_its_schema(site):
    schema = json.loads((site / "api/v1/schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    index = json.loads((site / "api/v1/index.json").read_text())
    for layer in index["layers"]:
        jsonschema.validate(json.loads((site / layer["units"]).read_text()), schema)
    assert [layer["name"] for layer in index["layers"]] == [layer[0] for layer in LAYERS]
    assert (site / index["photographs"]).is_file() and (site / index["table"]).is_file()
    assert len(json.loads((site / index["photographs"]).read_text())) == PHOTOS
    with open_atlas(site.parent) as atlas:
        pd.testing.assert_frame_equal(pd.read_parquet(site / "units.parquet"), atlas.units())
    cited = yaml.safe_load((site / "CITATION.cff").read_text())
    assert cited["title"] == "Neuron Atlas: tiny" and cited["cff-version"] == "1.2.0"


def test_a_page_says_what_steps_were_computed_in(site):
    assert "computed in bfloat16 and float32" in Page(site / "method.html").plain
    index = json.loads((site / "api/v1/index.json").read_text())
    for order, layer in enumerate(index["layers"]):
        for preset in layer["presets"]:
            assert preset["precision"] == (["bfloat16", "float32"] if order else ["float32"])
            assert f"steps in {' and '.join(preset['precision'])}:" in Page(site / layer["page"]).plain


def test_without_parquet_the_table_is_csv(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "table_name", lambda: "units.csv")
    path = write_atlas(tmp_path / "atlas.h5", layers=LAYERS[:1])
    build(path)
    with (tmp_path / "site/units.csv").open() as handle:
        assert len(list(csv.DictReader(handle))) == 6


def test_home_tells_the_facts(site):
    page = Page(site / "index.html")
    with open_atlas(site.parent) as atlas:
        units = sum(len(layer.channels) for layer in atlas)
        total = sum(layer.total_channels for layer in atlas)
    facts = [f"Units {units}", f"Dataset images {PHOTOS}", "Failures 1", v.share(units / total).text, "20 of 40"]
    facts += ["1 unit with a failed visualization", "Even <b>ones</b> 2"]
    for fact in facts:
        assert fact in page.plain, fact
    order = [a["href"] for a in page.all("a") if (a["href"] or "").startswith("layers/")]
    pages = [f"layers/{safe_name(layer[0])}.html" for layer in LAYERS]
    # Once in the diagram, once in the list.
    assert order == pages * 2


def test_method_is_told_from_the_configuration(site):
    words = Page(site / "method.html").plain
    for fact in ("model: tiny", "Feature Visualization", "distill", "torch 9.9", "maxₓ", "Σᵢⱼ", "decay = 1.25", "1/f",
                 "Rotate about the center", "degrees = 10.0", "steps = 128", "Treves–Rolls"):  # fmt: skip
        assert fact in words, fact
    several = method.describe(
        "render: {objective: {name: neuron}, negative: true}\nalso: {b: {name: own, objective: {name: mine}}, c: 3}"
    )
    assert [p.name for p in several] == ["render", "own"]
    assert several[0].formula.startswith("minₓ") and several[1].objective.text == ()
    assert method.describe("[1]") == method.describe("a: 'b") == ()


def cell(site: Path, name: str, at: int, columns: int, width: int, height: int) -> np.ndarray:
    """A cell of a sheet, (height, width, 3)."""
    with Image.open(site / name) as sheet:
        found = np.asarray(sheet.convert("RGB"))
    top, left = at // columns * height, at % columns * width
    return found[top : top + height, left : left + width]


def test_pictures_and_crops_show_the_right_thing(site):
    index = shard(site, "index")
    per, across, px = index["sizes"]["thumb"]
    with open_atlas(site.parent) as atlas:
        for layer in atlas:
            facts = shard(site, f"{safe_name(layer.name)}/layer")
            for row, channel in enumerate(layer.channels.tolist()):
                for number, r in enumerate(facts["rendered"]):
                    group, variants, columns, width, height = r["sheet"]
                    start = row - row % group
                    for variant in range(variants):
                        at = (row - start) * variants + variant
                        name = f"media/{safe_name(layer.name)}/p{number}-{start}.webp"
                        shown = cell(site, name, at, columns, width, height)
                        stored = layer.image(channel, r["key"], variant)
                        stored = np.broadcast_to(stored, (*stored.shape[:2], 3))
                        middle = shown[8:-8, 8:-8].mean((0, 1))
                        assert np.abs(middle - stored.mean((0, 1))).max() < 8, (layer.name, channel, variant)
                thumb = cell(site, f"media/{safe_name(layer.name)}/a{row - row % per}.webp", row % per, across, px, px)
                stored = layer.image(channel).mean((0, 1))
                assert np.abs(thumb[8:-8, 8:-8].mean((0, 1)) - stored).max() < 8
                unit, _ = unit_of(site, layer, channel)
                tiny = index["sizes"]["tiny"]
                rank = unit["tiny"]
                small = cell(
                    site,
                    f"media/{safe_name(layer.name)}/b{rank - rank % tiny[0]}.webp",
                    rank % tiny[0],
                    *tiny[1:],
                    tiny[2],
                )
                assert np.abs(small[8:-8, 8:-8].mean((0, 1)) - stored).max() < 12
        # The unit in the upper right corner sees the green quarter, wherever the photograph comes from.
        layer = atlas["blocks.0.conv"]
        facts = shard(site, "blocks.0.conv/layer")
        group, each, columns, side = facts["crops"]
        unit, photos = unit_of(site, layer, 2)
        for value, photo, *_, at in [entry[:6] for entry in unit["examples"]["max"]]:
            assert value and at >= 0
            crop = cell(site, "media/blocks.0.conv/x0.jpg", (1 % group) * each + at, columns, side, side)
            assert np.abs(crop[4:12, 20:28].mean((0, 1)) - (10, 250, 10)).max() < 25
            # Whole pictures are kept once for all units, with the part that the network saw.
            place, width, height, *box = photos[str(photo)][2:]
            assert (place, width, height, box) == (photo, 4 * SIDE, 2 * SIDE, [0.5, 0, 1, 1])
            with Image.open(site / f"photos/{photo}.jpg") as whole:
                assert whole.size == (64, 32)
        # Where a unit sees everything, its photographs are shown and nothing is kept twice.
        assert shard(site, f"{safe_name('../../x')}/layer")["crops"] is None


def test_masks_are_sheets_of_half_the_size_beside_those_of_the_pictures(site):
    with open_atlas(site.parent / "atlas.h5") as atlas:
        layer = atlas["blocks.1.conv"]
        for number, key in enumerate(layer.presets):
            rendered = shard(site, "blocks.1.conv/layer")["rendered"][number]
            per, variants, columns, width, height = rendered["sheet"]
            assert rendered["masked"]
            for row, channel in enumerate(layer.channels.tolist()):
                start = row - row % per
                sheet = Image.open(site / f"media/blocks.1.conv/m{number}-{start}.webp").convert("L")
                for variant in range(variants):
                    at = (row - start) * variants + variant
                    left, top = at % columns * (width // 2), at // columns * (height // 2)
                    cell = np.asarray(sheet)[top : top + height // 2, left : left + width // 2]
                    half = cell.shape[1] // 2
                    assert cell[:, half + 2 :].min() > 245
                    expected = int(layer.mask(channel, key, variant)[0, 0])
                    assert abs(cell[:, : half - 2].mean() - expected) < 6
    assert not shard(site, "stem/layer")["rendered"][0]["masked"]  # of an atlas before there were masks
    assert not list((site / "media/stem").glob("m*"))


def test_all_images_have_words_and_sizes(site):
    for page in pages_of(site).values():
        for image in page.all("img"):
            assert image.get("alt") is not None and image.get("width") and image.get("height"), (page.path, image)
            assert image["alt"] or "icon.svg" in (image["src"] or "")


def test_hostile_text_stays_text(site):
    for page in pages_of(site).values():
        for script in page.all("script"):
            is_data = script.get("type") == "application/ld+json" and "u" in page.path.parts
            first = "static/theme.js?" in (script.get("src") or "")
            assert is_data or set(script) == ({"src"} if first else {"src", "defer"})
        assert (not page.all("style") and not page.all("b")) or page.path.name in ("index.html", "method.html")
        for tag, attributes in page.elements:
            bad = [key for key in attributes if key == "style" or key.startswith("on")]
            assert not bad, (page.path, tag, bad)
    family = Page(site / "families" / f"{families.read_families(site.parent / 'families.yaml', {})[0].slug}.html")
    assert "Even <b>ones</b>" in family.plain and "<img src=x onerror=alert(9)>" in family.plain
    assert "</pre><script>alert(3)</script>" in Page(site / "method.html").words
    for path in site.rglob("*.js"):
        assert path.parent.name == "static" or "<" not in path.read_text()
    assert LABELS[2] in shard(site, "search")["words"]
    assert [entry[0] for entry in shard(site, "index")["layers"]] == [layer[0] for layer in LAYERS]


def test_nothing_is_written_outside(tmp_path):
    path = write_atlas(tmp_path / "run" / "atlas.h5")
    build(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["atlas.h5", "names.csv", "site"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    for part in ("layers/{}.html", "media/{}/a0.webp", "data/{}/u0.js", "api/v1/units/{}.json"):
        assert (path.parent / "site" / part.format(safe_name("../../x"))).is_file()


def test_pages_forbid_all_but_their_own(site):
    for page in pages_of(site).values():
        policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
        assert policy is not None and policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
    for path in [*site.rglob("*.css"), *(site / "static").glob("*.js")]:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text and "https://" not in text and "fetch(" not in text and "innerHTML" not in text
    assert len(gzip.compress((site / "static/core.js").read_bytes())) < 60_000


def test_failed_and_silent_units_are_flagged(site):
    with open_atlas(site.parent) as atlas:
        assert unit_of(site, atlas["blocks.0.conv"], 2)[0]["pictures"]["distill"][0]["status"] == "failed"
        assert unit_of(site, atlas["stem"], 3)[0]["stats"]["inactive"] is True
    statuses = shard(site, "blocks.0.conv/grid")["status"]
    assert statuses.index("failed") == 1 and statuses.count("failed") == 1
    assert "blocks.0.conv:2" in Page(site / "index.html").words


def test_a_layer_without_zero_says_so_and_shows_no_shares_above_zero(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    with h5py.File(path, "r+") as file:
        stats = file["layers/stem/stats"]
        stats.attrs["reference"] = "none"
        stats["nonzero"][:] = stats["sparsity"][:] = np.nan
        stats["inactive"][:] = False
        labels = file["layers/stem/labels"]
        labels["best"][:] = -1
        labels["chosen"] = np.tile(np.array([0, 1], np.int32), (len(labels["best"]), 1))
    build(path)
    site = tmp_path / "site"
    linear, other = Page(site / "layers/stem.html").words, Page(site / "layers/blocks.0.conv.html").words
    assert "Linear output: no zero." in linear and "Linear output" not in other
    assert (
        shard(site, "stem/layer")["reference"] == "none" and shard(site, "blocks.0.conv/layer")["reference"] == "zero"
    )
    assert {"nonzero", "sparsity"}.isdisjoint(shard(site, "stem/grid")) and "max" in shard(site, "stem/grid")
    with open_atlas(path) as atlas:
        assert atlas["stem"].reference == "none" and atlas["blocks.0.conv"].reference == "zero"
        unit = unit_of(site, atlas["stem"], 3)[0]
        assert unit["stats"]["nonzero"] is None and "best" not in unit["labels"]
        assert unit["labels"]["chosen"] == list(atlas.dataset_labels[:2])


def test_without_examples(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5", examples=False)
    report = build(path)
    assert report.pictures > 0
    assert check_links(tmp_path / "site") > 50
    assert not list((tmp_path / "site").rglob("x*.jpg")) and not (tmp_path / "site/photos").exists()
    assert "has no dataset examples" in Page(tmp_path / "site/index.html").plain
    assert "has no stored activations" in Page(tmp_path / "site/map.html").plain
    assert "nan" not in (tmp_path / "site/data/stem/u0.js").read_text().lower()


def test_without_pictures(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5", pictures=False)
    assert build(path).pictures == 0
    assert check_links(tmp_path / "site") > 50
    assert (
        "has no feature visualizations" in Page(tmp_path / "site/index.html").plain
        and "has no feature visualizations" in Page(tmp_path / "site/method.html").plain
    )
    # The best photograph stands for a unit: green, for it looks at the upper right corner.
    _, across, px = shard(tmp_path / "site", "index")["sizes"]["thumb"]
    thumb = cell(tmp_path / "site", "media/blocks.0.conv/a0.webp", 0, across, px, px)
    assert thumb[4:12, 30:40, 1].mean() > 180


def test_with_neither_and_with_nothing(tmp_path):
    build(write_atlas(tmp_path / "a" / "atlas.h5", pictures=False, examples=False))
    assert check_links(tmp_path / "a/site") > 20
    build(write_atlas(tmp_path / "b" / "atlas.h5", layers=()))
    assert "This atlas has no layers" in Page(tmp_path / "b/site/index.html").plain
    layers = (("empty", "conv", 7, (), 4, 3, 32, 3),)
    build(write_atlas(tmp_path / "c" / "atlas.h5", pictures=False, examples=False, layers=layers))
    assert "No unit of this layer" in layer_page(tmp_path / "c/site", "empty").plain


def test_no_examples_wanted(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    build(path, config=dataclasses.replace(SMALL, examples=0, means=0, least=0, per_bin=0, similar=0))
    unit = shard(tmp_path / "site", "stem/u0")["units"][0]
    assert "examples" not in unit and "similar" not in unit and unit["stats"]
    assert not list((tmp_path / "site").rglob("x*.jpg"))


# ------------------------------------------------------------------------------------------------- licences


@pytest.mark.parametrize("licence", ["crop", "blur", "ids"])
def test_licences(tmp_path, site, licence):
    path = write_atlas(tmp_path / "atlas.h5", layers=LAYERS[1:4])
    build(path, config=dataclasses.replace(SMALL, licence=licence))
    here = tmp_path / "site"
    crops, photos = list(here.rglob("x*.jpg")), list(here.glob("photos/*"))
    unit = shard(here, "blocks.0.conv/u0")
    told = next(iter(unit["photos"].values()))
    assert told[0].endswith(".jpg")
    assert bool(crops) == (licence != "ids") and bool(photos) == (licence == "blur")
    assert (len(told) == 2) == (licence != "blur")
    assert bool(list(here.rglob("h0.js"))) == (licence != "ids")
    if licence == "blur":
        with Image.open(photos[0]) as image, Image.open(site / "photos" / photos[0].name) as sharp:
            assert np.asarray(image).std() < 0.8 * np.asarray(sharp).std()
    if licence == "crop":
        # The spectrum's photographs are not kept whole, so their crops are.
        assert all(entry[5] >= 0 for entry in unit["units"][0]["examples"]["spectrum"])
        assert shard(here, f"{safe_name('../../x')}/layer")["crops"]
    words = {"crop": "only receptive fields are shown", "blur": "shown blurred", "ids": "only file names are shown"}
    assert words[licence] in Page(here / "method.html").plain


# ---------------------------------------------------------------------------------------- builds, old and new


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.long
def test_same_atlas_same_bytes(site, tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    (tmp_path / "families.yaml").write_text(FAMILIES)
    build(path)
    first = contents(tmp_path / "site")
    assert build(path).rebuilt_units == 0
    assert contents(tmp_path / "site") == first == contents(site)


@pytest.mark.long
def test_only_what_changed_is_made_again(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    report = build(path)
    assert report.rebuilt_units == report.units
    before = contents(tmp_path / "site")
    stood = (tmp_path / "site/media/head/a0.webp").stat()
    build(write_atlas(path, seed=9), tmp_path / "fresh")
    assert build(path).rebuilt_units == 6
    after = contents(tmp_path / "site")
    assert after == contents(tmp_path / "fresh")
    changed = {name for name in after if after[name] != before.get(name)}
    assert {"media/stem/a0.webp", "media/stem/p0-0.webp", "data/index.js"} <= changed
    assert not [name for name in changed if name.startswith(("media/head", "data/head", "photos"))]
    # What stays is the same file, not a copy of it.
    assert (tmp_path / "site/media/head/a0.webp").stat().st_ino == stood.st_ino
    assert build(path, config=dataclasses.replace(SMALL, quality=60)).rebuilt_units == report.units
    assert build(path, config=dataclasses.replace(SMALL, quality=60, title="Another")).rebuilt_units == 0


def test_all_that_a_layer_holds_is_told_by_its_fingerprint(tmp_path):
    """Whatever is changed of a layer, and nothing else, gives it another fingerprint."""
    path = write_atlas(tmp_path / "atlas.h5")

    def prints():
        with open_atlas(path) as atlas:
            return {layer.name: layer.fingerprint() for layer in atlas}

    found = [prints()]
    for change in ("a number", "a text", "an attribute", "a picture", "its digest"):
        with h5py.File(path, "r+") as file:
            layer = file["layers/stem"]
            if change == "a number":
                layer["stats/max"][0] += 1
            elif change == "a text":
                layer["render/distill/status"][0] = "retried"
            elif change == "an attribute":
                layer["render/distill"].attrs["preset"] = "another"
            elif change == "a picture":
                layer["render/distill/images"][0, 0, 0, 0] += 1
            else:
                write_array(layer["render/distill"], "images_sha256", np.zeros((6, 1, 32), np.uint8))
        found.append(prints())
    assert len({each["stem"] for each in found}) == 6
    assert all(each["head"] == found[0]["head"] for each in found)


def test_pictures_are_read_as_hdf5_reads_them(tmp_path):
    with create_file(tmp_path / "one.h5") as file:
        rng = np.random.default_rng(0)
        kept = rng.integers(0, 255, (3, 2, 5, 7, 3), np.uint8)
        write_array(file, "images", kept)
        file.create_dataset("plain", data=kept)
        file.create_dataset("shuffled", data=kept, chunks=(1, 1, 5, 7, 3), compression="gzip", shuffle=True)
        file.create_dataset("empty", (3, 2, 5, 7, 3), np.uint8, chunks=(1, 1, 5, 7, 3), compression="gzip")
    with h5py.File(tmp_path / "one.h5") as file:
        for name in ("images", "plain", "shuffled"):
            stack = Stack(file[name])
            assert all((stack[at] == kept[at]).all() for at in itertools.product(range(3), range(2)))
        assert not Stack(file["empty"])[1, 1].any()
        at = file["images"].id.get_chunk_info_by_coord((1, 1, 0, 0, 0))
    with (tmp_path / "one.h5").open("r+b") as raw:  # a picture whose bytes have gone bad is an error, never a picture
        raw.seek(at.byte_offset + at.size // 2)
        byte = raw.read(1)[0]
        raw.seek(-1, io.SEEK_CUR)
        raw.write(bytes([byte ^ 255]))
    with h5py.File(tmp_path / "one.h5") as file:
        assert (Stack(file["images"])[1, 0] == kept[1, 0]).all()
        with pytest.raises(OSError):
            Stack(file["images"])[1, 1]


@given(
    st.lists(st.floats(width=32) | st.floats(-100, 100, width=32) | st.integers(-9, 9).map(float), min_size=1).map(
        lambda values: np.resize(np.array(values, np.float32), (40, 3))
    )
)
def test_decimals_are_the_shortest_ones_of_numpy(values):
    alone = [[float(str(v)) if np.isfinite(v) else None for v in row] for row in values]
    assert js_shards.shortest_decimals(values) == alone == [js_shards.shortest_decimals(row) for row in values]
    drawn = [[float(f"{v:.4g}") if np.isfinite(v) else None for v in row] for row in values.astype(float).tolist()]
    rounded = js_shards.rounded_decimals(values)
    near = [v == w or abs(v - w) <= 1.001e-3 * abs(v) for a, b in zip(drawn, rounded, strict=True)
            for v, w in zip(a, b, strict=True)]  # fmt: skip
    assert all(near)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_webp_files_have_the_format_size_and_quality_that_were_requested(mode):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (9, 11, 3), np.uint8)).resize((111, 91)).convert(mode)
    errors, sizes = [], []
    for quality in (20, 78, 100):
        data = size_budget.encode(image, "webp", quality)
        decoded = Image.open(io.BytesIO(data))
        assert (decoded.format, decoded.size) == ("WEBP", (111, 91))
        errors.append(np.abs(np.asarray(decoded.convert(mode)).astype(int) - np.asarray(image)).mean())
        sizes.append(len(data))
    assert errors == sorted(errors, reverse=True) and errors[1] < 4 and sizes == sorted(sizes)


@pytest.mark.long
def test_beside_this_process(site, tmp_path):
    """Several processes write the same bytes as one."""
    path = write_atlas(tmp_path / "atlas.h5")
    (tmp_path / "families.yaml").write_text(FAMILIES)
    build(path, config=dataclasses.replace(SMALL, workers=2))
    assert contents(tmp_path / "site") == contents(site)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_build_keeps_the_old_site(tmp_path, error):
    path = write_atlas(tmp_path / "atlas.h5")
    build(path)
    before = contents(tmp_path / "site")

    def stop(done: int, total: int) -> None:
        if done == total:
            raise error()

    with open_atlas(path) as atlas, pytest.raises(error):
        build_site(atlas, tmp_path / "site", SiteConfig(title="Another"), stop)
    assert contents(tmp_path / "site") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["atlas.h5", "names.csv", "site"]


def test_an_interrupted_first_build_leaves_nothing(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with open_atlas(path) as atlas, pytest.raises(KeyboardInterrupt):
        build_site(atlas, tmp_path / "site", SMALL, stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["atlas.h5", "names.csv"]


@pytest.mark.long
def test_a_new_build_replaces_all_of_the_old(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    build(path)
    build(write_atlas(path, layers=LAYERS[:1]))
    for folder in ("layers", "media", "data"):
        assert not [p for p in (tmp_path / "site" / folder).iterdir() if "conv" in p.name]


def test_leftovers_of_a_killed_build_are_mended(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    build(path)
    before = contents(tmp_path / "site")
    # Killed between the two renames, while another one was being written.
    (tmp_path / "site").rename(tmp_path / ".site.old")
    (tmp_path / ".site.new").mkdir()
    (tmp_path / ".site.new/half.html").write_text("half")
    build(path)
    assert contents(tmp_path / "site") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["atlas.h5", "names.csv", "site"]


def test_foreign_folders_are_left_alone(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(AtlasError, match="not a site of Neuron Atlas"):
        build(path, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    build(path, tmp_path / "empty")
    assert (tmp_path / "empty/index.html").is_file()


# -------------------------------------------------------------------------------------------- sizes and hosts


def test_sizes_are_chosen_to_fit(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5")
    plain = build(path, tmp_path / "plain")
    few = build(path, tmp_path / "few", dataclasses.replace(SMALL, max_files=110))
    # The images of the home page and the cards have files of their own in any case.
    others = len(list((tmp_path / "few/wall").iterdir())) + len(list((tmp_path / "few/cards").rglob("*.jpg")))
    assert few.files < plain.files and few.files - others <= 116
    with open_atlas(path) as atlas:
        layers = LAYERS[1:2]
        assert layers
        inventory = size_budget.Inventory([], [], [], 0, 30)
        assert size_budget.choose(atlas, inventory, SMALL).level == 0
    levels = size_budget.levels(SiteConfig())
    assert [s.level for s in levels] == list(range(5))
    assert all(a.picture_px > b.picture_px and a.quality > b.quality for a, b in itertools.pairwise(levels))


def test_groups_divide_a_piece():
    for spread in (1, 2, 3, 4, 6, 8, 12, 24):
        for base in size_budget.levels(SiteConfig()):
            s = dataclasses.replace(base, spread=spread)
            groups = [s.per_thumb, s.per_tiny, s.per_shard, s.per_heat, s.per_crops(12), s.per_crops(24)]
            groups += [s.per_picture(*s.picture(side, side), v) for side in (32, 128, 224, 512) for v in (1, 4)]
            assert all(n >= 1 and size_budget.CHUNK % n == 0 for n in groups)
    assert Chunk("a", 0, 0, 240, np.arange(240), ()).stop == size_budget.CHUNK


def test_big_atlases_become_smaller(tmp_path):
    """A thousand times as many units as there are: counted exactly, weighed by a sample."""
    path = write_atlas(tmp_path / "atlas.h5", layers=LAYERS[:1])
    with open_atlas(path) as atlas:
        facts = summarize(next(iter(atlas)), 0, ())
        many = dataclasses.replace(facts, channels=tuple(c % 6 for c in range(60_000)), total=60_000)
        config = SiteConfig(max_bytes=60_000_000, max_files=6_000)
        inventory = size_budget.Inventory([many], [12], [True], 3_000, 100)
        chosen = size_budget.choose(atlas, inventory, config)
        assert chosen.level > 0 and size_budget.files(chosen, inventory) <= 6_000 < size_budget.files(
            size_budget.levels(config)[0], inventory
        )


def test_hosts_say_why_not():
    report = hosts.Report(25_000, 2_000_000_000, "media/", 20_000, 1, 30_000_000, 12_000)
    answers = {host.key: report.why_not(host) for host in hosts.HOSTS}
    assert "2,000,000,000 bytes" in answers["github"] and "25,000 files" in answers["cloudflare"]
    assert answers["huggingface"] and not answers["bucket"]
    assert sum("no: " in line for line in report.lines()) == 4


@pytest.mark.parametrize("target", [host.key for host in hosts.HOSTS])
def test_publish(tmp_path, target):
    build(write_atlas(tmp_path / "atlas.h5", layers=LAYERS[:1]))
    report, command = hosts.prepare_for_host(tmp_path / "site", target, 'A "title"\nof two')
    assert report.files > 10 and str(tmp_path / "site") in command
    assert (tmp_path / "site/.nojekyll").is_file() and "Content-Security-Policy" in (
        tmp_path / "site/_headers"
    ).read_text()
    if target == "huggingface":
        _, front, _ = (tmp_path / "site/README.md").read_text().split("---\n")
        assert yaml.safe_load(front)["title"] == 'A "title" of two' and yaml.safe_load(front)["sdk"] == "static"
    if target == "gitlab":
        assert yaml.safe_load((tmp_path / "site/.gitlab-ci.yml").read_text())["pages"]["publish"] == "."


def test_publish_refuses(tmp_path, monkeypatch):
    with pytest.raises(AtlasError, match="Valid: bucket, cloudflare"):
        hosts.prepare_for_host(tmp_path, "geo", "x")
    with pytest.raises(AtlasError, match="contains no site"):
        hosts.prepare_for_host(tmp_path, "github", "x")
    build(write_atlas(tmp_path / "atlas.h5", layers=LAYERS[:1]))
    small = dataclasses.replace(hosts.HOSTS[0], files=3)
    monkeypatch.setattr(hosts, "HOSTS", (small,))
    with pytest.raises(AtlasError, match=r"does not accept this site: .* files, 3 at most"):
        hosts.prepare_for_host(tmp_path / "site", "github", "x")


def test_serve(site, tmp_path):
    with pytest.raises(AtlasError, match="contains no site"):
        server(tmp_path, 0)
    with server(site, 0) as found:
        with pytest.raises(AtlasError, match="port=8001"):
            server(site, found.server_port)
        assert found.server_address[0] == "127.0.0.1"
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        base = f"http://127.0.0.1:{found.server_port}"
        try:
            with urllib.request.urlopen(f"{base}/index.html") as answer:
                assert answer.read() == (site / "index.html").read_bytes()
            with pytest.raises(urllib.error.HTTPError) as missing:
                urllib.request.urlopen(f"{base}/layers/gone.html")
            with missing.value as error:
                assert error.code == 404 and error.read() == (site / "404.html").read_bytes()
        finally:
            found.shutdown()
            thread.join()


@pytest.fixture
def served(site):
    """The address of a site that is served."""
    with server(site, 0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found.server_port
        found.shutdown()
        thread.join()


def asked(port: int, path: str, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    with contextlib.closing(connection):
        response = connection.getresponse()
        response.body = response.read()  # type: ignore[attr-defined]
        return response


def test_serve_answers_to_its_own_names_only(served):
    """A page of another site reaches the server under a name of its own, and must learn nothing."""
    for host in (f"127.0.0.1:{served}", f"localhost:{served}", f"[::1]:{served}"):
        assert asked(served, "/index.html", Host=host).status == 200, host
    for host in ("evil.example", f"evil.example:{served}", "127.0.0.1:1", f"127.0.0.1.evil.example:{served}", ""):
        answer = asked(served, "/index.html", Host=host)
        assert answer.status == 421 and b"atlas" not in answer.body, host


def test_serve_sends_files_of_the_site_alone(served, site, tmp_path):
    (tmp_path / "secret").write_text("secret")
    links = [site / "link.txt", site / "door"]
    links[0].symlink_to(tmp_path / "secret")
    links[1].symlink_to(tmp_path)
    try:
        for path in (
            "/link.txt",
            "/door/secret",
            "/.build.json",
            "/media/",
            "/media",
            "/..%2fatlas.h5",
            "/%2e%2e/atlas.h5",
            "/a%00b",
        ):
            answer = asked(served, path)
            assert answer.status == 404 and b"secret" not in answer.body, path
    finally:
        for link in links:
            link.unlink()
    answer = asked(served, "/index.html")
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert asked(served, "/").body == answer.body == (site / "index.html").read_bytes()


def test_serve_sends_parts_of_files(served, site):
    whole = (site / "index.html").read_bytes()
    for asked_for, part in (("0-9", whole[:10]), ("10-", whole[10:]), ("-7", whole[-7:]), ("5-9999999", whole[5:])):
        answer = asked(served, "/index.html", Range=f"bytes={asked_for}")
        assert answer.status == 206 and answer.body == part, asked_for
        assert answer.headers["Content-Range"].endswith(f"/{len(whole)}")
    assert asked(served, "/index.html", Range=f"bytes={len(whole)}-").status == 416
    assert asked(served, "/index.html", Range="bytes=0-1,4-5").body == whole


def test_serve_is_not_held_up_by_connections_that_say_nothing(site, monkeypatch, capfd):
    monkeypatch.setattr(serve._Handler, "timeout", 0.3)
    with server(site, 0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        silent = [socket.create_connection(("127.0.0.1", found.server_port)) for _ in range(100)]
        try:
            assert asked(found.server_port, "/index.html").status == 200
            assert threading.active_count() < 100
        finally:
            for connection in silent:
                connection.close()
            found.shutdown()
            thread.join()
    assert "Traceback" not in capfd.readouterr().err


def test_publish_leaves_no_file_of_another_host(tmp_path):
    folder = tmp_path / "it's here; touch X"
    folder.mkdir()
    build(write_atlas(folder / "atlas.h5", layers=LAYERS[:1]))
    target = folder / "site"
    for host, name in (("gitlab", ".gitlab-ci.yml"), ("huggingface", "README.md"), ("bucket", "")):
        _, command = hosts.prepare_for_host(target, host, "x")
        left = {file.name for file in target.iterdir()} & set(hosts.EXTRA_FILES.values())
        assert left == ({name} if name else set()), host
        assert str(target) in shlex.split(command), host
    assert "--exclude '.*'" in command
    # The commands for GitHub publish again, also if nothing has changed, up to the push.
    commands = hosts.prepare_for_host(target, "github", "x")[1].rpartition("&& git push")[0]
    user = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    for _ in range(2):
        subprocess.run(["sh", "-c", commands], check=True, env={**os.environ, **user})


def test_a_site_is_built_without_links_in_the_one_before(tmp_path):
    """The folder of a run that somebody else made may hold links to files of this machine."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "old" / "media").mkdir(parents=True)
    (tmp_path / "old" / "media" / "1.webp").write_text("image")
    assert output.adopt(tmp_path / "old", tmp_path / "new", "media") and (tmp_path / "new/media/1.webp").exists()
    (tmp_path / "old" / "media" / "2.webp").symlink_to(tmp_path / "secret")
    assert not output.adopt(tmp_path / "old", tmp_path / "newer", "media") and not (tmp_path / "newer").exists()


def test_authors_are_named_where_their_images_are_shown(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5", layers=LAYERS[:1])
    build(path)
    assert "CC BY 2.0" not in (tmp_path / "site/method.html").read_text()
    with h5py.File(path, "r+") as file:
        file["dataset/path"][0] = "sklearn/china.jpg#0,0,9,9"
        file["provenance/config"][()] = "model: {source: package, weights: default}\ndata: {root: /home/somebody/x}"
    build(path)
    page = (tmp_path / "site/method.html").read_text()
    assert "danielbuechele" in page and "CC BY 2.0" in page and "vultilion" not in page
    assert "ML Illustrated, Apache License 2.0" in page and "somebody" not in page


# ------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("[1, 2]", "must contain `families:`"),
        ("families: [{units: []}]", "needs a `name`"),
        ("families: [{name: a, colour: red}]", "has 'colour'"),
        ("families: [{name: a, units: stem:1}]", "must be a list"),
        ("families: [{name: a, units: [stem]}]", "is not a unit"),
        ("families: [{name: a, source: 'javascript:alert(1)'}]", "must begin with https"),
        ("families: [{name: a}, {name: A}]", "two families"),
    ],
)
def test_families_that_are_none(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(AtlasError, match=message):
        families.read_families(tmp_path / "mine.yaml", {})
    with pytest.raises(AtlasError, match="can't be read"):
        families.read_families(tmp_path / "none.yaml", {})


def test_families_are_pages_and_tags(site):
    assert shard(site, "families") == {"blocks.0.conv:2": [0], "../../x:1": [0]}
    name, href, count = shard(site, "index")["families"][0]
    assert (name, count) == ("Even <b>ones</b>", 2)
    assert Page(site / href).plain.count("not in this atlas") == 2
    assert "2 of 4 units" in Page(site / "families.html").plain


# ---------------------------------------------------------------------------------------------------- plane


def test_like_units_lie_together():
    rng = np.random.default_rng(3)
    centres = rng.normal(0, 1, (5, 40))
    kind = rng.integers(0, 5, 300)
    responses = (centres[kind] + 0.1 * rng.normal(0, 1, (300, 40))).astype(np.float16)
    vectors = embedding.unit_vectors([responses[:100], responses[100:]])
    assert vectors is not None
    components = principal_components(vectors)
    method_, places = embedding.project(components)
    assert method_ in ("PCA", "UMAP") and places.min() >= 0 and places.max() <= embedding.GRID
    again = embedding.project(principal_components(vectors))[1]
    assert np.array_equal(places, again)
    middles = np.stack([places[kind == k].mean(0) for k in range(5)])
    within = max(places[kind == k].std(0).max() for k in range(5))
    apart = np.linalg.norm(middles[:, None] - middles[None], axis=-1)[~np.eye(5, dtype=bool)].min()
    assert apart > within
    # A sheet holds units of few kinds.
    order = embedding.sheet_order(components, 20)
    assert sorted(order) == list(range(300))
    kinds = [len(set(kind[order // 20 == sheet])) for sheet in range(15)]
    assert np.mean(kinds) < 2.5
    assert embedding.unit_vectors([None, responses]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.23456, "1.23"), (-12.345, "−12.3"), (0.012345, "0.012"), (1234.5, "1,234"), (3e-5, "3.0 × 10⁻⁵"),
     (2.5e9, "2.5 × 10⁹"), (float("nan"), "—"), (float("inf"), "—")],
)  # fmt: skip
def test_numbers_for_people(value, text):
    assert v.number(value).text == text


def test_shares_and_ratios_do_not_lie():
    assert [v.share(s).text for s in (0, 0.0001, 0.12345, 0.9999, 1)] == [
        "0%",
        "< 0.1%",
        "12.3%",
        "99.9%",
        "100%",
    ]
    assert float(v.number(np.float32(0.1)).exact) == pytest.approx(0.1)
    assert np.float32(v.number(np.float32(1) / 3).exact) == np.float32(1) / np.float32(3)


@pytest.mark.parametrize(
    ("store", "share", "licence", "per_photo", "celled", "whole"),
    [
        ("images", 0.2, "full", 1, ("max", "min"), True),
        ("images", 0.5, "full", 1, (), True),
        ("images", 0.5, "full", 4, ("max", "min"), True),
        ("images", 0.5, "crop", 1, ("max", "mean", "min", "spectrum", "relevant"), False),
        ("crops", 0.5, "full", 1, ("max", "mean", "min", "spectrum", "relevant"), False),
        ("images", 0.5, "ids", 1, (), False),
    ],
)
def test_crops_are_kept_where_whole_pictures_cannot_show_them(store, share, licence, per_photo, celled, whole):
    chosen = dataclasses.replace(size_budget.levels(SiteConfig())[0], per_photo=per_photo)
    showing = choose_showing(store, True, share, SiteConfig(licence=licence), chosen)
    assert (showing.celled, showing.whole_images) == (celled, whole)


def test_the_titles_of_metrics_stand_in_their_table_only(site):
    """Scripts and the method page take them from there: a title that is written out there can differ from it."""
    titles = {metric.title for metric in METRICS if " " in metric.title}
    scripts = [HERE / "static" / name for name in STATIC if name.endswith(".js")]
    written = [*scripts, HERE / "templates" / "method.html"]
    for path in written:
        text = path.read_text()
        assert not [title for title in titles if f'"{title}"' in text or f"<dt>{title}</dt>" in text], path.name
    method_page = (site / "method.html").read_text()
    index = shard(site, "index")
    assert {name: entry["title"] for name, entry in index["metrics"].items()} == {m.name: m.title for m in METRICS}
    defined = [metric.title for metric in METRICS if metric.name in ("natural", "agreement", "path_similarity")]
    assert all(f"<dt>{title}</dt>" in method_page for title in defined)
    assert set(index["quality"]) >= set(index["grid"]) and index["quality"][0] == "peak_ratio"
