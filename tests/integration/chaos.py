"""Faults of workers, drivers, nodes and disks at random moments: no result may be lost, damaged or different.

    scripts/chaos 200            # so many faults; about 10 s each on two cores

Rounds of a small run on a `ray.cluster_utils.Cluster` go on under faults until each is complete:

    worker, driver, node   is killed
    hang                   a worker is stopped (SIGSTOP) and answers nothing; the run must replace it by itself
    images, results        the disk with the dataset, or with the run folder, fails with EIO for up to 10 s, and loses
                           what was not synced to it. The disks are ext4 file systems, shut down by ioctl: needs root

After every fault all shards must be readable to the last byte, and every shard that was ever seen must still be the
same file. No command may end with the exit code of a crash. Each finished atlas.h5 must equal that of an undisturbed
run without Ray.
"""

import argparse
import dataclasses
import fcntl
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"

import h5py
import numpy as np
import psutil
from PIL import Image

from pipeline.core.errors import AtlasError
from pipeline.planning.folder import RunFolder
from pipeline.runs import maintenance
from pipeline.store import hdf5, shards

# A tiny network with random weights; tasks of about a second.
SMALL = [
    "model=timm", "model.name=test_efficientnet", "model.weights=null", "model.input_size=64",
    "layers=convs", "layers.include=[conv_stem,blocks.1.0.*,conv_head,classifier]",
    "render.size=32", "render.margin=4", "examples.k=3", "examples.batch=4", "examples.per_task=8",
    "data=folder", "engine.batch=2", "engine.task_seconds=0.5", "engine.patience=120", "engine.max_failures=1000",
    "engine.timeout_seconds=30", "engine.attempts=6",
]  # fmt: skip

# How often each kind of fault is chosen.
FAULTS = {"worker": 10, "hang": 4, "node": 3, "driver": 3}
DISK_FAULTS = {"images": 2, "results": 4}

# EXT4_IOC_SHUTDOWN and its flag that writes the journal first: what was synced is kept, everything else is lost.
SHUTDOWN, FLUSH_JOURNAL = 0x8004587D, struct.pack("I", 1)

CRASHED = 70

# A round that takes longer is stuck; its log is printed then.
ROUND_SECONDS = 2400.0

# Equal to the bit, wherever they were computed; all that is measured of a picture is as near as the picture.
EXACT = ("channels", "seed", "status", "steps")


def photographs(root: Path, count: int) -> None:
    for i in range(count):
        rng = np.random.default_rng(i)
        folder = root / f"label {i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (4 + i % 9, 5 + i % 7, 3), np.uint8))
        image.resize((90 + i, 70 + 2 * i), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")


def atlas_command(verb: str, overrides: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", "import sys; from pipeline.cli.main import main; sys.exit(main())", verb, *overrides]


def contents(path: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    with h5py.File(path, "r", locking=False) as file:

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and item.ndim:
                found[name] = hdf5.read_array(file, name)

        file.visititems(visit)
    return found


def differences(one: Path, other: Path) -> list[str]:
    """Where two atlases differ: identity, seeds and examples by a bit, pictures by more than one level of 255."""
    a, b = contents(one), contents(other)
    wrong = sorted(a.keys() ^ b.keys())
    for name in a.keys() & b.keys():
        last = name.rpartition("/")[2]
        if last == "images":
            if np.abs(a[name].astype(int) - b[name]).max() > 1:
                wrong.append(name)
        elif (last in EXACT or "/render/" not in name) and not np.array_equal(
            a[name], b[name], equal_nan=a[name].dtype.kind == "f"
        ):
            wrong.append(name)
    return wrong


class Disk:
    """An ext4 file system in a file, mounted at a folder. Needs root, and a mount namespace that ends with the test."""

    def __init__(self, image: Path, folder: Path) -> None:
        self.image, self.folder, self.copies = image, folder, 0
        folder.mkdir(parents=True)
        with image.open("wb") as file:
            file.truncate(256 << 20)
        subprocess.run(["mkfs.ext4", "-q", image], check=True)
        self._mount()

    def _mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", self.image, self.folder], check=True)

    def fail(self) -> None:
        """From now on reads, writes and renames fail with EIO."""
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, SHUTDOWN, FLUSH_JOURNAL)
        finally:
            os.close(handle)

    def come_back(self) -> None:
        """Mount a copy of what is on the disk; files that were open on the failed one go on failing."""
        self.remove()
        self.copies += 1
        failed, self.image = self.image, self.image.with_suffix(f".{self.copies}")
        subprocess.run(["cp", "--sparse=always", failed, self.image], check=True)
        failed.unlink()
        self._mount()

    def remove(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)


@dataclasses.dataclass
class Outcome:
    """What came of it."""

    rounds: int = 0
    faults: Counter[str] = dataclasses.field(default_factory=Counter)
    shards_read: int = 0
    unreadable: list[str] = dataclasses.field(default_factory=list)
    lost: list[str] = dataclasses.field(default_factory=list)
    different: list[str] = dataclasses.field(default_factory=list)
    crashes: list[str] = dataclasses.field(default_factory=list)
    exits: Counter[str] = dataclasses.field(default_factory=Counter)


class Chaos:
    """A cluster, a run on it, and faults."""

    def __init__(
        self, root: Path, seed: int, channels: int, steps: int, disks: bool, say: Any, limit: float = ROUND_SECONDS
    ) -> None:
        from ray.cluster_utils import Cluster

        self.root, self.say, self.random, self.limit = root, say, random.Random(seed), limit
        self.disks = {name: Disk(root / f"{name}.ext4", root / name) for name in DISK_FAULTS} if disks else {}
        self.faults = FAULTS | (DISK_FAULTS if disks else {})
        self.bag: list[str] = []
        photographs(root / "images" / "photographs", 24)
        self.settings = [
            *SMALL, f"data.root={root}/images/photographs", f"run.root={root}/results",
            f"layers.channels='0:{channels}'", f"render.steps={steps}",
        ]  # fmt: skip
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False},
        )
        self.nodes = [self._node(), self._node()]
        self.outcome = Outcome()
        self.seen: dict[Path, tuple[int, int]] = {}
        self.checked: set[tuple[int, int]] = set()

    def _node(self) -> Any:
        return self.cluster.add_node(num_cpus=1, wait=False)

    def undisturbed(self) -> None:
        # As many threads as the cluster's workers have: sums over more threads round their last bit otherwise.
        arguments = [*self.settings, "engine=inline", "engine.cpus_per_worker=1", "run.name=undisturbed"]
        subprocess.run(atlas_command("run", arguments), check=True, capture_output=True)

    def close(self) -> None:
        self.cluster.shutdown()
        for disk in self.disks.values():
            disk.remove()

    def launch(self, name: str) -> subprocess.Popen[bytes]:
        arguments = [*self.settings, "engine=ray", f"engine.address={self.cluster.address}", f"run.name={name}"]
        self.log = (self.root / f"{name}.log").open("ab")
        return subprocess.Popen(atlas_command("run", arguments), stdout=self.log, stderr=self.log)

    def workers(self) -> list[psutil.Process]:
        """Actors of this cluster that are at a task now; Ray shows it in the process's title."""
        found = []
        for node in self.nodes:
            for raylet in node.all_processes.get("raylet", ()):
                try:
                    family = psutil.Process(raylet.process.pid).children()
                    found += [child for child in family if "ray::VersionedActor.do" in " ".join(child.cmdline())]
                except psutil.NoSuchProcess:
                    continue
        return found

    def draw(self) -> str:
        """The next kind of fault. Each kind comes in turn before any comes again more often than its share."""
        if not self.bag:
            self.bag = [kind for kind, share in self.faults.items() for _ in range(share)]
            self.random.shuffle(self.bag)
        return self.bag.pop()

    def fault(self, kind: str, driver: subprocess.Popen[bytes]) -> str:
        """What was done; empty if there was no worker. A worker that was stopped before is killed."""
        if kind == "driver":
            driver.kill()
            driver.wait()
        elif kind in self.disks:
            self.disks[kind].fail()
            time.sleep(self.random.uniform(0.0, 10.0))
            self.disks[kind].come_back()
        elif kind == "node":
            node = self.nodes.pop(self.random.randrange(len(self.nodes)))
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self._node())
        else:
            ours = self.workers()
            if not ours:
                return ""
            try:
                chosen = self.random.choice(ours)
                if kind == "hang" and chosen.status() != psutil.STATUS_STOPPED:
                    chosen.suspend()
                else:
                    kind = "worker"
                    chosen.kill()
            except psutil.NoSuchProcess:
                return ""
        self.outcome.faults[kind] += 1
        return kind

    def check(self, folder: RunFolder) -> None:
        """All shards whole, and all that were ever there still there, untouched."""
        for path, mark in self.seen.items():
            if not path.exists():
                self.outcome.lost.append(path.name)
            elif (path.stat().st_ino, path.stat().st_mtime_ns) != mark:
                self.outcome.lost.append(f"{path.name} was written again")
        for path in folder.shards.rglob("*.h5"):
            status = path.stat()
            mark = self.seen[path] = (status.st_ino, status.st_mtime_ns)
            if mark in self.checked:
                continue
            shard = shards.read(path)
            if shard is None or shard.damage():
                self.outcome.unreadable.append(str(path))
            self.checked.add(mark)
            self.outcome.shards_read += 1

    def round(self, faults: int) -> None:
        """One run, from nothing to complete, under at most so many faults."""
        self.outcome.rounds += 1
        name = f"round{self.outcome.rounds}"
        folder = RunFolder(self.root / "results" / name)
        self.seen, self.checked = {}, set()
        driver, done, began = self.launch(name), 0, time.monotonic()
        due = 0.0
        while True:
            code = driver.poll()
            if code is not None:
                self.outcome.exits[str(code)] += code >= 0
                if code == 0:
                    break
                if code == CRASHED:
                    self.outcome.crashes.append(Path(self.log.name).read_text()[-4000:])
                    self.say(self.outcome.crashes[-1])
                driver = self.launch(name)
            if time.monotonic() - began > self.limit:
                driver.kill()
                raise AssertionError(f"{name} does not end; see {self.log.name}")
            if due == 0.0 and (self.workers() or self.random.random() < 0.002):
                due = time.monotonic() + self.random.uniform(0.0, 6.0)
            if done < faults and due and time.monotonic() >= due:
                made = self.fault(self.draw(), driver)
                if made:
                    done += 1
                    self.say(f"{name}: fault {sum(self.outcome.faults.values())}, {made}; {len(self.seen)} shards")
                    self.check(folder)
                due = 0.0
            time.sleep(0.05)
        self.check(folder)
        problems = maintenance.verify(folder)
        problems += [
            (d, "differs") for d in differences(self.root / "results" / "undisturbed" / "atlas.h5", folder.atlas)
        ]
        self.outcome.different += [f"{name}: {where} {what}" for where, what in problems]
        for where, what in problems:
            self.say(f"{name}: {where} {what}")
        self.say(f"{name}: complete after {time.monotonic() - began:.0f} s and {done} faults, {len(problems)} problems")
        if not problems:
            shutil.rmtree(folder.path)


def can_have_disks() -> bool:
    """Whether file systems can be mounted here without anybody else's notice: by root, in an own mount namespace."""
    own = ["unshare", "--mount", "mkfs.ext4", "-V"]
    return (
        os.geteuid() == 0
        and Path("/dev/loop-control").exists()
        and not subprocess.run(own, capture_output=True).returncode
    )


def run(
    faults: int,
    seed: int = 0,
    channels: int = 24,
    steps: int = 20,
    disks: bool = False,
    say: Any = sys.stderr.write,
    limit: float = ROUND_SECONDS,
) -> Outcome:
    """So many faults over as many rounds as they take, with at most 50 a round."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as root:
        chaos = Chaos(Path(root), seed, channels, steps, disks, say, limit)
        try:
            chaos.undisturbed()
            say("the undisturbed run is complete")
            while sum(chaos.outcome.faults.values()) < faults:
                chaos.round(min(50, faults - sum(chaos.outcome.faults.values())))
        except (AssertionError, AtlasError):
            for log in Path(root).glob("*.log"):
                say(log.read_text()[-4000:])
            raise
        finally:
            chaos.close()
        return chaos.outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", type=int, nargs="?", default=200)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--channels", type=int, default=24, help="channels of each layer")
    parser.add_argument("--steps", type=int, default=20, help="optimization steps")
    parser.add_argument("--limit", type=float, default=ROUND_SECONDS, help="seconds of a round, at most")
    parser.add_argument("--own-mounts", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if can_have_disks() and not wanted.own_mounts:
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv, "--own-mounts"])
    if not wanted.own_mounts:
        sys.stderr.write("No disks fail: that needs root, loop devices, unshare and mkfs.ext4.\n")
    began = time.monotonic()
    outcome = run(
        wanted.faults, wanted.seed, wanted.channels, wanted.steps, wanted.own_mounts,
        say=lambda line: sys.stdout.write(f"{line}\n") and sys.stdout.flush(), limit=wanted.limit,
    )  # fmt: skip
    told = vars(outcome) | {"seconds": round(time.monotonic() - began)}
    sys.stdout.write(json.dumps(told, indent=1) + "\n")
    return int(bool(outcome.unreadable or outcome.lost or outcome.different or outcome.crashes))


if __name__ == "__main__":
    sys.exit(main())
