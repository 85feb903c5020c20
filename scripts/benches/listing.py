#!/usr/bin/env python3
"""Measure how a folder of many images is listed and planned, and the memory that its listing takes.

scripts/bench listing --images 200000 --out DIR [--parts first,second,worker,plan]
scripts/bench listing --images 1280000 --parts table           without files: a listing in the cache, and a worker

DIR gets a folder of `--images` small PNG files (hard links to a few) in `--folders` folders, which later calls use
again; without --out it is temporary. Each measurement is a process of its own, with an empty cache of listings first:
seconds of listing and fingerprint, first and second time; memory of the driver; bytes that are sent to a worker, in the
message and in shared memory; memory of a worker of Ray with the dataset and without; and seconds of `atlas plan`,
twice. Seconds are those of the clock, and in brackets of the processor, which other processes disturb less.
"""

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

HERE = Path(__file__).resolve().parents[2]

# Distinct images; file systems limit the number of links to one file.
DISTINCT = 100
# Channels of a pass over every layer of a small network, which bound the number of images with stored bins.
CHANNELS = 22_000


def make_folder(root: Path, images: int, folders: int) -> Path:
    """Create `images` files in `folders` folders, unless they exist, and return the folder."""
    target = root / f"images-{images}"
    finished = root / f"images-{images}.finished"
    if finished.is_file():
        return target
    originals = root / "originals"
    originals.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for i in range(DISTINCT):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(originals / f"{i}.png")
    for folder in range(folders):
        place = target / f"n{folder:08d}"
        place.mkdir(parents=True, exist_ok=True)
        for number in range(folder, images, folders):
            link = place / f"n{folder:08d}_{number:08d}.png"
            if not link.exists():
                os.link(originals / f"{number % DISTINCT}.png", link)
    finished.touch()
    time.sleep(3)  # folders that have just changed are listed again
    return target


def megabytes() -> float:
    """Return the memory that only this process uses, in MB."""
    return psutil.Process().memory_full_info().uss / 1e6


class Clock:
    """Seconds since its creation, of the clock and of the processor."""

    def __init__(self) -> None:
        self._began, self._busy = time.perf_counter(), time.process_time()

    def text(self) -> str:
        """Return both as text."""
        return f"{time.perf_counter() - self._began:.2f} s ({time.process_time() - self._busy:.2f} s)"


def listed(root: str) -> tuple[object, str, str]:
    """Return the dataset, seconds of listing and seconds of its fingerprint."""
    from pipeline.data import datasets
    from pipeline.data.config import DataConfig
    from pipeline.models.config import Preprocessing

    clock = Clock()
    dataset = datasets.list_dataset(DataConfig("folder", root))
    seconds, clock = clock.text(), Clock()
    recipe = Preprocessing((224, 224), 256, (0.5,) * 3, (0.25,) * 3)
    digest = datasets.fingerprint(dataset, recipe)
    print(f"  {len(dataset.images):,} images, fingerprint {digest[:16]}")
    return dataset, seconds, clock.text()


def listing(root: str) -> None:
    """List once in this process and print seconds and memory."""
    from pipeline.data import datasets  # noqa: F401
    from pipeline.examples import sweep  # noqa: F401

    before = megabytes()
    dataset, seconds, fingerprint = listed(root)
    print(f"  listing {seconds}, fingerprint {fingerprint}, {megabytes() - before:.0f} MB of this process")
    buffers: list[pickle.PickleBuffer] = []
    clock = Clock()
    message = pickle.dumps(dataset, protocol=5, buffer_callback=buffers.append)
    shared = sum(buffer.raw().nbytes for buffer in buffers)
    print(
        f"  pickled in {clock.text()}: {len(message) / 1e6:.2f} MB message, "
        f"{shared / 1e6:.1f} MB shared by the workers of a machine"
    )


def worker(root: str) -> None:
    """Print the memory that the dataset takes in a worker of Ray."""
    import ray

    from pipeline.examples.sweep import ExamplesConfig, ImageSubsets

    dataset, _, _ = listed(root)
    ray.init(num_cpus=1, include_dashboard=False, logging_level="error", configure_logging=False)

    def load(reference: list[object]) -> tuple[float, float, float, float]:
        before, began = psutil.Process().memory_full_info(), time.perf_counter()
        found = ray.get(reference[0])
        subsets = ImageSubsets.of(found, ExamplesConfig(), CHANNELS)  # type: ignore[arg-type]
        found.images[len(found.images) // 2]  # type: ignore[attr-defined]
        assert len(subsets.sample)
        seconds, after = time.perf_counter() - began, psutil.Process().memory_full_info()
        return before.uss / 1e6, (after.uss - before.uss) / 1e6, (after.rss - before.rss) / 1e6, seconds

    def start() -> None:
        from pipeline.data import datasets  # noqa: F401
        from pipeline.examples import sweep  # noqa: F401

    def measure(reference: list[object]) -> tuple[float, float, float, float]:
        start()
        return load(reference)

    reference = ray.put(dataset)
    without, own, resident, seconds = ray.get(ray.remote(measure).remote([reference]))
    print(
        f"  worker: {without:.0f} MB before; the dataset adds {own:.0f} MB of its own and {resident:.0f} MB resident, "
        f"shared pages included, in {seconds:.2f} s"
    )
    ray.shutdown()


def table(images: int) -> None:
    """Print seconds and memory of a listing in the cache, of any number of images, without their files."""
    from pipeline.data import datasets, listing_cache
    from pipeline.data.image_table import ImageTable, draw_hashes, text_array
    from pipeline.data.readers.folder_scan import Folder
    from pipeline.examples.sweep import ExamplesConfig, ImageSubsets
    from pipeline.models.config import Preprocessing

    count = -(-images // 1000)
    numbers = np.arange(images, dtype=np.int32) // count
    paths = [f"n{number:08d}/n{number:08d}_{i:08d}.JPEG" for i, number in enumerate(numbers.tolist())]
    columns = {"path": text_array(paths), "size": np.full(images, 110_000), "hash": draw_hashes(paths)}
    folders = [Folder(f"n{number:08d}", (0, 0, 0)) for number in range(1000)]
    made = ImageTable.of_columns(columns, numbers, [folder.path for folder in folders])
    listing_cache.save("bench", made.batch, numbers, folders)
    del paths, columns, made
    clock = Clock()
    cached = listing_cache.load("bench")
    assert cached is not None
    dataset = datasets.Dataset(ImageTable(cached.batch), {"": "/images"})
    print(f"  {images:,} images from the cache in {clock.text()}", end="")
    for time_of in ("first", "second"):
        clock = Clock()
        datasets.fingerprint(dataset, Preprocessing((224, 224), 256, (0.5,) * 3, (0.25,) * 3))
        print(f", {time_of} fingerprint {clock.text()}", end="")
    print()
    buffers: list[pickle.PickleBuffer] = []
    message = pickle.dumps(dataset, protocol=5, buffer_callback=buffers.append)
    shared = Path(os.environ["XDG_CACHE_HOME"], "shared")
    shared.write_bytes(buffers[0].raw())
    size = shared.stat().st_size / 1e6
    del cached, dataset, buffers
    before, clock = megabytes(), Clock()
    worker = pickle.loads(message, buffers=[np.memmap(shared, mode="r")])
    ImageSubsets.of(worker, ExamplesConfig(), CHANNELS)
    own = megabytes() - before
    print(f"  worker: {clock.text()}, {own:.0f} MB of its own and {size:.0f} MB shared with the others of a machine")


def plan(root: str, runs: str) -> None:
    """Print the seconds of `atlas plan`."""
    overrides = [
        "model=timm", "model.name=test_efficientnet", "model.weights=null", "model.input_size=64", "layers=tour",
        "layers.channels='0:2'", "engine=inline", "data=folder", f"data.root={root}", f"run.root={runs}",
    ]  # fmt: skip
    before, began = os.times(), time.perf_counter()
    command = [sys.executable, "-m", "pipeline", "plan", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    after = os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"  atlas plan: {time.perf_counter() - began:.1f} s ({busy:.1f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--folders", type=int, default=1_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default="first,second,worker,plan")
    parser.add_argument("--in-process", choices=("listing", "worker", "table"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.in_process:
        if options.in_process == "table":
            return table(options.images)
        return {"listing": listing, "worker": worker}[options.in_process](str(options.out))
    with tempfile.TemporaryDirectory() as scratch:
        root = Path()
        if options.parts != "table":
            root = make_folder((options.out or Path(scratch, "data")).absolute(), options.images, options.folders)
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch, "cache"))
        os.environ |= {"PYTHONPATH": str(HERE), "RAY_AUTH_MODE": "disabled"}
        parts = {"first": "listing", "second": "listing", "worker": "worker", "table": "table"}
        for part in options.parts.split(","):
            print(part, flush=True)
            if part in parts:
                own = [sys.executable, __file__, "--in-process", parts[part], "--out", str(root)]
                own += ["--images", str(options.images)]
                subprocess.run(own, check=True)
            else:
                plan(str(root), str(Path(scratch, "runs")))
                plan(str(root), str(Path(scratch, "runs")))
    return None


if __name__ == "__main__":
    main()
