"""Measure the size of a site and the time to build, rebuild and view it.

scripts/bench site [--folder F] [--layers N] [--keep]    a synthetic atlas: 26,560 units in ResNet-50's 53 layers
scripts/bench site --run runs/NAME                       an existing atlas: sizes and browser only

Images of the synthetic atlas are noise with the spectrum of a natural image, in the sizes of `render.size=auto`; 240
different ones per size are repeated, as are 240 dataset images for the 3,000 that are shown. The browser is Debian's
Chromium. Sizes are those of the requested files as hosts send them, with text compressed by gzip, and sizes on disk.
"""

import argparse
import functools
import gzip
import hashlib
import io
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image

import pipeline
import pipeline.cli.main  # `atlas site` has loaded these modules, torch among them, before a build starts
from pipeline.site.build import SiteReport, build_site
from pipeline.site.config import SiteConfig
from pipeline.site.hosting.serve import _Handler
from pipeline.store.hdf5 import create_file, create_images, write_array

SHOWN = 3000
DATASET = 50_000
DIFFERENT = 240
SUBSET = 1024
K, BINS, PER_BIN = 8, 6, 3


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def resnet50() -> list[tuple[str, int, int, int]]:
    """Return (name, channels, map side, receptive field) of its 53 convolutions; field 0 if it exceeds the input."""
    found = [("conv1", 64, 112, 7)]
    field = 11
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        side = 112 >> stage
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            field += 2 * (4 << (stage - 1))
            seen = field if field < 224 else 0
            found += [(f"{name}.conv1", width, side, seen), (f"{name}.conv2", width, side, seen)]
            found += [(f"{name}.conv3", 4 * width, side, seen)]
            if block == 0:
                found.append((f"{name}.downsample.0", 4 * width, side, seen))
    return found


def noise(side: tuple[int, int], seed: int, power: float = 1.1) -> np.ndarray:
    """Return an image (H, W, 3) uint8 with a 1/f spectrum, which compresses about as well as visualizations."""
    rng = np.random.default_rng(seed)
    height, width = side
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    scale = 1 / np.maximum(np.hypot(fy, fx), 1 / max(side)) ** power
    shape = (3, height, width // 2 + 1)
    waves = np.fft.irfft2((rng.normal(size=shape) + 1j * rng.normal(size=shape)) * scale, s=side)
    mixed = np.tensordot(np.array([[1, 0.35, 0.1], [1, 0, -0.1], [1, -0.3, 0.1]]), waves, 1)
    mixed = (mixed - mixed.mean()) / mixed.std()
    return (mixed.transpose(1, 2, 0) * 48 + 128).clip(0, 255).astype(np.uint8)


def chunk_of(pixels: np.ndarray) -> bytes:
    """Return the bytes of an HDF5 chunk of an image: gzip, then the checksum, written by HDF5 itself."""
    with h5py.File("one", "w", driver="core", backing_store=False) as file:
        data = create_images(file, "images", (1, 1, *pixels.shape))
        data[0, 0] = pixels
        return data.id.read_direct_chunk((0, 0, 0, 0, 0))[1]


def synthetic(path: Path, layers: list[tuple[str, int, int, int]], changed: str = "") -> None:
    """Write an atlas in the schema of the store; the layer `changed` gets other images."""
    rng = np.random.default_rng(1)
    made: dict[int, list[tuple[bytes, np.ndarray]]] = {}
    words = [f"label {i}" for i in range(1000)]
    blobs = [np.asarray(Image.fromarray(noise((16, 16), i)[..., 0]).resize((14, 14))) for i in range(64)]
    with create_file(path) as file:
        file.attrs.update(
            schema="neuron-atlas", schema_version=2, run="synthetic", model="resnet50", weights_sha256="ab" * 32,
            dataset_fingerprint="cd" * 32, versions="{}", created="2026-01-02T03:04:05+00:00", failures=0,
            identity=hashlib.sha256(changed.encode()).hexdigest(),
        )  # fmt: skip
        file.create_dataset("provenance/config", data="render: {name: distill, objective: {name: channel}}\n")
        for order, (name, channels, side, field) in enumerate(layers):
            group = file.create_group(f"layers/{name}")
            stride = 224 // side
            group.attrs.update(
                name=name, order=order, kind="conv", channels=channels, map_height=side, map_width=side,
                receptive_field=[field] * 2, receptive_field_stride=[stride] * 2,
                receptive_field_offset=[-(field // 2)] * 2, input_size=[224] * 2,
            )  # fmt: skip
            write_array(group, "channels", np.arange(channels, dtype=np.int32))
            px = min(192, max(128, field or 192))
            if px not in made:
                made[px] = [(chunk_of(p), p) for p in (noise((px, px), i) for i in range(DIFFERENT))]
            _pictures(group, rng, channels, px, made[px], order + (7 if name == changed else 0))
            _examples(group, rng, channels, side, blobs, len(words))
        paths = [f"val/ILSVRC2012_val_{i:08d}.JPEG" for i in range(DATASET)]
        write_array(file, "dataset/path", np.array(paths, object))
        write_array(file, "dataset/label", np.array([words[i % 1000] for i in range(DATASET)], object))
        write_array(file, "dataset/source", np.arange(DATASET, dtype=np.int32))
        write_array(file, "dataset/labels", np.array(words, object))
        write_array(file, "dataset/responses", np.arange(SUBSET, dtype=np.int32))
        shown = file.create_group("dataset/shown")
        shown.attrs["store"] = "images"
        write_array(shown, "index", np.arange(SHOWN, dtype=np.int32) * (DATASET // SHOWN))
        write_array(shown, "size", np.tile(np.array([[500, 375]], np.int32), (SHOWN, 1)))
        write_array(shown, "box", np.tile(np.array([[86, 23, 414, 351]], np.float32), (SHOWN, 1)))
        photos = []
        for i in range(DIFFERENT):
            with io.BytesIO() as buffer:
                Image.fromarray(noise((240, 320), 1000 + i, 1.5)).save(buffer, "JPEG", quality=85)
                photos.append(buffer.getvalue())
        every = [photos[i % DIFFERENT] for i in range(SHOWN)]
        write_array(shown, "offset", np.cumsum([0, *map(len, every)]))
        shown.create_dataset("jpeg", data=np.frombuffer(b"".join(every), np.uint8), chunks=True, fletcher32=True)


def _pictures(
    group: h5py.Group, rng: np.random.Generator, channels: int, px: int, made: list[tuple[bytes, np.ndarray]], by: int
) -> None:
    target = group.create_group("render/channel")
    target.attrs.update(natural="mean", objective="channel", preset="distill", digest=f"{by:02x}" * 32)
    images = create_images(target, "images", (channels, 1, px, px, 3))
    digests = np.zeros((channels, 1, 32), np.uint8)
    for row in range(channels):
        chunk, pixels = made[(row + 31 * by) % DIFFERENT]
        images.id.write_direct_chunk((row, 0, 0, 0, 0), chunk, 0)
        digests[row, 0] = np.frombuffer(hashlib.sha256(pixels.tobytes()).digest(), np.uint8)
    write_array(target, "images_sha256", digests)
    for key in ("activation", "robust", "start", "seconds"):
        write_array(target, key, rng.normal(3, 1, (channels, 1)).astype(np.float32))
    write_array(target, "trace", np.sort(rng.normal(3, 1, (channels, 1, 16))).astype(np.float32))
    write_array(target, "seed", rng.integers(0, 2**62, (channels, 1)))
    write_array(target, "steps", np.full((channels, 1), 128, np.int32))
    write_array(target, "status", np.full((channels, 1), "converged", object))
    write_array(target, "reason", np.full((channels, 1), "", object))


def _examples(
    group: h5py.Group, rng: np.random.Generator, channels: int, side: int, blobs: list[np.ndarray], words: int
) -> None:
    lists = {"max": K, "mean": K, "min": K, "spectrum": BINS * PER_BIN}
    each = sum(lists.values())
    first = 0
    for name, k in lists.items():
        write_array(group, f"examples/{name}/value", -np.sort(-rng.gamma(2, 2, (channels, k)).astype(np.float32)))
        index = rng.integers(0, SHOWN, (channels, k), np.int32) * (DATASET // SHOWN)
        write_array(group, f"examples/{name}/index", index)
        for key in ("y", "x"):
            write_array(group, f"examples/{name}/{key}", rng.integers(0, side, (channels, k)).astype(np.int16))
        pairs = np.arange(channels, dtype=np.int32)[:, None] * each + first + np.arange(k, dtype=np.int32)
        write_array(group, f"examples/{name}/map", pairs.astype(np.int32))
        first += k
    group["examples/spectrum"].attrs["edges"] = np.array([0, 1, 25, 50, 75, 99, 100.0])
    maps = min(14, side)
    small = np.stack([blob[:maps, :maps] for blob in blobs])
    write_array(group, "examples/maps/value", small[np.arange(channels * each) % len(small)])
    write_array(group, "examples/maps/range", np.sort(rng.normal(0, 2, (channels * each, 2))).astype(np.float32))
    for key in ("mean", "sd", "max", "min", "nonzero", "fired", "best_mean", "least_mean", "sparsity", "kurtosis"):
        write_array(group, f"stats/{key}", rng.uniform(0, 9, channels).astype(np.float32))
    write_array(group, "stats/inactive", np.zeros(channels, bool))
    write_array(group, "histogram/counts", rng.integers(0, 400, (channels, 256)).astype(np.int32))
    write_array(group, "histogram/range", np.tile(np.array([[-1, 9]], np.float32), (channels, 1)))
    write_array(group, "histogram/ends", np.tile(np.array([[-0.9, 8.9]], np.float32), (channels, 1)))
    topics = rng.normal(0, 1, (12, SUBSET))
    write_array(group, "responses", (rng.normal(0, 1, (channels, 12)) @ topics).astype(np.float16))
    write_array(group, "labels/over", rng.integers(0, words, (channels, 3)).astype(np.int32))
    write_array(group, "labels/count", rng.integers(1, 9, (channels, 3)).astype(np.int32))
    write_array(group, "labels/lift", rng.uniform(1, 90, (channels, 3)).astype(np.float32))
    write_array(group, "labels/best", rng.integers(0, words, channels).astype(np.int32))
    for key in ("selectivity", "auroc"):
        write_array(group, f"labels/{key}", rng.uniform(0, 1, channels).astype(np.float32))
    group["labels"].attrs["method"] = "responses"


def built(atlas: Path, site: Path, config: SiteConfig) -> tuple[SiteReport, float]:
    """Build the site and return the report and the seconds that it took."""
    began = time.monotonic()
    with pipeline.open_atlas(atlas) as opened:
        report = build_site(opened, site, config)
    return report, time.monotonic() - began


def looked(site: Path, rows: list[tuple[str, str, str]]) -> None:
    """Measure sizes and times in a real Chromium, over http in a sub-folder."""
    import http.server

    from playwright.sync_api import sync_playwright

    index = json.loads((site / "data/index.js").read_text().partition(",")[2].rpartition(")")[0])
    layers = [(name, slug, runs[-1][1] + 1) for name, slug, _, runs, _, _ in index["layers"] if runs]
    largest = max(layers, key=lambda layer: layer[2])
    last = layers[-1]
    core = gzip.compress((site / "static/core.js").read_bytes(), 6)
    rows.append(("core script, gzipped", f"{len(core) / 1e3:.1f} kB", "60 kB"))
    handler = functools.partial(_Handler, directory=str(site.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as play:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/{site.name}/"
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=flags)

        def opened(path: str) -> tuple[Any, dict[str, tuple[int, int]]]:
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            page.set_default_timeout(60_000)
            weights: dict[str, tuple[int, int]] = {}

            def took(response: Any) -> None:
                name = response.url.removeprefix(base).partition("?")[0].partition("#")[0]
                weights[name] = weighed(site / name)

            page.on("response", took)
            page.goto(base + path)
            page.wait_for_timeout(1500)
            return page, weights

        def weigh(what: str, path: str, most: str) -> Any:
            page, weights = opened(path)
            sent, stored = (sum(sizes) / 1e3 for sizes in zip(*weights.values(), strict=True))
            rows.append((what, f"{sent:.0f} kB in {len(weights)} files ({stored:.0f} kB on the disk)", most))
            return page, weights

        weigh("home", "index.html", "200 kB")
        weigh(f"layer, first view ({layers[0][0]})", f"layers/{layers[0][1]}.html", "500 kB")
        page, _ = weigh(f"layer, first view ({largest[0]}, {largest[2]})", f"layers/{largest[1]}.html", "500 kB")
        page.close()
        for name, _, _ in (layers[len(layers) // 8], last):
            page, weights = weigh(f"unit view ({name})", f"unit.html#{name}:{index_first(index, name)}", "300 kB")
            page.mouse.wheel(0, 4000)
            page.wait_for_timeout(800)
            rows.append(("   scrolled to its end", f"{sum(sent for sent, _ in weights.values()) / 1e3:.0f} kB", ""))
            page.close()
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(f"{base}layers/{largest[1]}.html")
        page.wait_for_function("() => document.body.dataset.ready")
        paint = page.evaluate(
            "new Promise(done => new PerformanceObserver(list => done(list.getEntries()[0].startTime))"
            ".observe({type: 'paint', buffered: true}))"
        )
        ready = page.evaluate("performance.now()")
        tiles = page.locator(".tile").count()
        rows.append(
            (f"{tiles:,} units: first paint", f"{paint / 1e3:.2f} s (all tiles there {ready / 1e3:.2f} s)", "1.5 s")
        )
        gaps, frames, slowest = 0, 0, 0.0
        height = page.evaluate("document.documentElement.scrollHeight - innerHeight")
        steps = max(1, int(height // 450))
        for _ in range(steps):  # half a screen per 0.1 s: fast scrolling
            page.mouse.wheel(0, 450)
            page.wait_for_timeout(100)
            found = page.evaluate(BLANK)
            gaps += found["blank"]
            frames += found["seen"]
        times = page.evaluate(SMOOTH)
        slowest = max(times)
        rows.append(("   blank tiles while scrolling", f"{gaps} of {frames:,} looked at", "0"))
        rows.append(
            ("   frames while scrolling", f"median {sorted(times)[len(times) // 2]:.0f} ms, worst {slowest:.0f} ms", "")
        )
        began = time.monotonic()
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.goto(base + "map.html")
        page.wait_for_function("() => document.body.dataset.ready")
        rows.append(("map of all units, ready", f"{time.monotonic() - began:.2f} s", ""))
        page.locator("#search").focus()
        page.wait_for_timeout(1000)
        for word in ("label 77", "label"):
            rows.append((f"search of {word!r} over 60,000 units", f"{page.evaluate(SEARCH, word):.1f} ms", ""))
        browser.close()
        server.shutdown()


def weighed(path: Path) -> tuple[int, int]:
    """Return the bytes of a file as a host sends it, and on disk."""
    if not path.is_file():
        return 0, 0
    held = path.read_bytes()
    text = path.suffix in {".html", ".js", ".css", ".json", ".svg"}
    return len(gzip.compress(held, 6)) if text else len(held), len(held)


def index_first(index: dict[str, Any], name: str) -> int:
    """Return a channel in the middle of a layer."""
    runs = next(layer[3] for layer in index["layers"] if layer[0] == name)
    return runs[len(runs) // 2][0] + (runs[len(runs) // 2][1] - runs[len(runs) // 2][0]) // 2


# Visible tiles whose sheet is not loaded yet, whether requested or not.
BLANK = """() => {
  const entries = new Set(performance.getEntriesByType("resource").filter(e => e.responseEnd).map(e => e.name));
  let blank = 0, seen = 0;
  for (const tile of document.querySelectorAll(".tile .pic")) {
    const box = tile.getBoundingClientRect();
    if (box.bottom < 0 || box.top > innerHeight) continue;
    seen++;
    const url = /url\\("(.*)"\\)/.exec(tile.style.backgroundImage);
    if (!url || !entries.has(new URL(url[1], location.href).href)) blank++;
  }
  return { blank, seen };
}"""
# The lists of all layers are repeated up to 60,000 units in total; the slowest of five.
SEARCH = """async (word) => {
  const words = await ATLAS.need("search");
  const total = words.units.reduce((sum, layer) => sum + layer.length, 0) || 1;
  const units = words.units.map((layer) => {
    const count = Math.ceil(layer.length * 60000 / total);
    return Array.from({ length: count }, (_, i) => layer[i % layer.length]);
  });
  const many = { words: words.words, units };
  const times = [];
  for (let i = 0; i < 5; i++) {
    const began = performance.now();
    ATLAS.search(word, many, 40);
    times.push(performance.now() - began);
  }
  return Math.max(...times);
}"""
SMOOTH = """async () => {
  const times = [];
  let last = performance.now();
  for (let i = 0; i < 120; i++) {
    window.scrollBy(0, i < 60 ? -60 : 60);
    await new Promise(requestAnimationFrame);
    times.push(performance.now() - last);
    last = performance.now();
  }
  return times;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "neuron-atlas-site")
    parser.add_argument("--layers", type=int, default=53)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--browser-only", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of the site")
    options = parser.parse_args()
    given = dict(pair.split("=", 1) for pair in options.set)
    config = SiteConfig(**{k: int(v) if v.isdigit() else v for k, v in given.items()})  # type: ignore[arg-type]
    rows: list[tuple[str, str, str]] = []
    folder = options.folder
    if options.run:
        atlas, site = options.run / "atlas.h5", folder / "real"
        report, seconds = built(atlas, site, config)
        rows.append(("build", f"{report.units:,} units in {seconds:.1f} s", ""))
        rows.append(("files, bytes", f"{report.files:,}, {report.bytes / 1e6:.1f} MB", ""))
    else:
        layers = resnet50()[-options.layers :]
        units = sum(layer[1] for layer in layers)
        first, second, site = folder / "atlas.h5", folder / "changed.h5", folder / "site"
        if not first.is_file():
            synthetic(first, layers)
        if not second.is_file():
            synthetic(second, layers, "layer2.1.conv2")
        say(f"{units:,} units in {len(layers)} layers, {first.stat().st_size / 1e9:.2f} GB")
        if not options.browser_only:
            shutil.rmtree(site, ignore_errors=True)
            report, seconds = built(first, site, config)
            rows.append(("build", f"{seconds:.1f} s, {units / seconds:.0f} units/s", "500 units/s"))
            rows.append(("files", f"{report.files:,}", "10,000"))
            rows.append(("bytes", f"{report.bytes / 1e6:.0f} MB (level {report.level})", "900 MB"))
            again, less = built(second, site, config)
            rows.append((f"again, {again.rebuilt_units} units changed", f"{less:.1f} s, {less / seconds:.1%}", "10 %"))
            for line in report.host.lines():
                say(line)
    say("\n".join(f"| {a} | {b} | {c} |" for a, b, c in rows))
    done = len(rows)
    looked(site, rows)
    say("\n".join(f"| {a} | {b} | {c} |" for a, b, c in rows[done:]))
    if not options.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
