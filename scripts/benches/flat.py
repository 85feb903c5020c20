"""Measure the memory of a dataset pass over very many small images, and test a pass that is killed.

scripts/bench flat [--count 100000] [--folder FOLDER]

Makes synthetic images (32 × 32 JPEG, in tar shards), runs the pass over a tenth of them and then over all, in separate
processes, and prints the peak memory of each. Kills the second process when a third of its shards exist, and prints how
many images the next one had left to read. The folder is removed at the end.
"""

import argparse
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

PER_TAR = 5000


def make(folder: Path, count: int) -> None:
    """Write tar shards of noise images in ten colors, with one label per color."""
    for start in range(0, count, PER_TAR):
        path = folder / f"{start // PER_TAR:04d}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".part"), "w") as archive:
            for i in range(start, min(start + PER_TAR, count)):
                rng = np.random.default_rng(i)
                small = (rng.integers(0, 160, (4, 4, 3)) + np.eye(3, dtype=int)[i % 3] * 90).astype(np.uint8)
                with io.BytesIO() as buffer:
                    Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "JPEG")
                    jpeg = buffer.getvalue()
                for name, data in ((f"{i:06d}.jpg", jpeg), (f"{i:06d}.cls", str(i % 10).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        path.with_suffix(".part").rename(path)


def sweep(folder: Path, count: int, name: str) -> None:
    """Run `atlas examples` once in this process and print time and memory."""
    from pipeline.cli.main import main

    began = time.monotonic()
    code = main(
        [
            "examples", "model=timm", "model.name=test_efficientnet", "model.weights=null", "model.input_size=32",
            "model.resize=32", "layers=convs", "layers.channels=spread:4", "data=webdataset", f"data.root={folder}",
            f"data.limit={count}", f"run.root={folder}/runs", f"run.name={name}", "engine=inline", "examples.batch=64",
            "examples.side=32", "engine.progress_seconds=30",
        ]
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"code": code, "seconds": round(time.monotonic() - began, 1), "peak_gib": round(peak, 3)}))


def shards_of(folder: Path, name: str) -> list[tuple[int, int]]:
    found = (folder / "runs" / name / "shards" / "examples").glob("*.h5")
    return [(int(a), int(b)) for a, b in (p.name.split("-")[:2] for p in found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "neuron-atlas-flat")
    parser.add_argument("--sweep", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder, count = options.folder, options.count
    if options.sweep:
        sweep(folder, count, options.sweep)
        return
    folder.mkdir(parents=True, exist_ok=True)
    make(folder, count)
    print(f"{count:,} images of 32 × 32 in {len(list(folder.glob('*.tar')))} tar shards", flush=True)

    def start(name: str, images: int) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, "--folder", str(folder), "--count", str(images), "--sweep", name]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def told(process: subprocess.Popen[str]) -> dict[str, float]:
        out, _ = process.communicate()
        return json.loads(out.strip().splitlines()[-1])

    few = told(start("few", count // 10))
    print(f"{count // 10:,} images: {few['seconds']:.0f} s, peak {few['peak_gib']:.2f} GiB", flush=True)
    process = start("all", count)
    while process.poll() is None and sum(b - a for a, b in shards_of(folder, "all")) < count / 3:
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = shards_of(folder, "all")
    kept = {p: p.stat().st_mtime_ns for p in (folder / "runs" / "all" / "shards").rglob("*.h5")}
    print(f"killed with {sum(b - a for a, b in done):,} images in {len(done)} shards", flush=True)
    rest = told(start("all", count))
    again = sum(1 for path, written in kept.items() if path.stat().st_mtime_ns != written)
    images = sum(b - a for a, b in shards_of(folder, "all"))
    print(f"the next went on and swept the other {images - sum(b - a for a, b in done):,} in {rest['seconds']:.0f} s: "
          f"peak {rest['peak_gib']:.2f} GiB, {again} of {len(kept)} shards written again")  # fmt: skip
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
