"""What is published and installed: the lock of the container, the wheel, the source distribution and their version."""

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pipeline

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "jobs" / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# Extras whose libraries are in the image.
EXTRAS = re.findall(r"--extra (\w+)", (ROOT / "scripts" / "lock").read_text(encoding="utf-8"))


def entries(path: Path) -> Iterator[tuple[Requirement, list[str]]]:
    """The requirements of a lock, and the sha256 of each."""
    text = re.sub(r"^#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", "")
    for line in text.splitlines():
        requirement, *hashes = re.split(r"\s+--hash=sha256:", line)
        yield Requirement(requirement), hashes


def versions(path: Path) -> dict[str, str]:
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one, _ in entries(path)}


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def dependencies(requirements: list[str], environment: dict[str, str]) -> set[str]:
    """The names of all libraries that requirements need, by the metadata of those that are installed."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        one = waiting.pop()
        extras = sorted(one.extras) or [""]
        if one.marker is not None and not one.marker.evaluate(environment | {"extra": ""}):
            continue
        name = canonicalize_name(one.name)
        known = f"{name}[{','.join(extras)}]"
        if known in found:
            continue
        found |= {name, known}
        try:
            inner = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform, or of an extra that the tests do not install
        for each in inner:
            if each.marker is None or any(each.marker.evaluate(environment | {"extra": extra}) for extra in extras):
                each.marker = None
                waiting.append(each)
    return {name for name in found if "[" not in name}


def test_the_lock_is_that_of_the_constraints() -> None:
    """`scripts/lock` writes it again after a change."""
    wanted = constraints()
    for name in ("libraries", "build"):
        locked = versions(LOCK / f"{name}.txt")
        different = {key: value for key, value in locked.items() if wanted.get(key, value) != value}
        assert not different, name
    unknown = versions(LOCK / "libraries.txt").keys() - wanted.keys()
    assert not unknown, "scripts/lock chose versions that constraints.txt does not have"
    for name in ("torch", "torchvision"):
        assert versions(LOCK / "torch.txt")[name] == wanted[name]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_lock_has_every_library_that_is_needed(python: str, machine: str) -> None:
    environment = {
        "python_version": python, "python_full_version": f"{python}.1", "platform_machine": machine,
        "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix",
        "implementation_name": "cpython", "platform_python_implementation": "CPython",
    }  # fmt: skip
    optional = PROJECT["optional-dependencies"]
    needed = dependencies(
        [*PROJECT["dependencies"], *(one for extra in EXTRAS for one in optional[extra])], environment
    )
    assert {"torch", "ray", "aiohttp", "pillow-heif"} <= needed  # aiohttp: Ray's dashboard and Jobs API
    locked = {
        canonicalize_name(one.name)
        for name in ("build", "torch", "libraries")
        for one, _ in entries(LOCK / f"{name}.txt")
        if one.marker is None or one.marker.evaluate(environment)
    }
    assert needed <= locked


@pytest.mark.parametrize("name", ["build", "torch", "libraries"])
def test_every_library_of_the_lock_has_its_hashes_and_no_address(name: str) -> None:
    found = list(entries(LOCK / f"{name}.txt"))
    for requirement, hashes in found:
        assert re.fullmatch(r"==[0-9][\w.]*", str(requirement.specifier)) and requirement.url is None
        assert hashes and all(re.fullmatch(r"[0-9a-f]{64}", one.strip()) for one in hashes), requirement.name
    assert len(found) == len({requirement.name for requirement, _ in found}) > 5
    assert "//" not in (LOCK / f"{name}.txt").read_text()


def test_the_workflow_tests_the_versions_of_python_that_are_promised() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert tuple(workflow["jobs"]["test"]["strategy"]["matrix"]["python"]) == PYTHONS
    promised = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3" in line]
    assert tuple(promised) == PYTHONS and PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_the_version_is_the_same_everywhere() -> None:
    version = pipeline.__version__
    assert PROJECT["dynamic"] == ["version"]  # read from pipeline/__init__.py
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert version in headings[:2]  # the first may be Unreleased
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    for file in ("Dockerfile", "jobs/kuberay.yaml"):
        assert set(re.findall(r"neuron-atlas:(\d[\d.]*\d)", (ROOT / file).read_text())) == {version}, file


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution of the checkout, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    backend = "import sys; from hatchling.build import build_{0} as build; build(sys.argv[1])"
    subprocess.run([sys.executable, "-c", backend.format("sdist"), folder], cwd=ROOT, check=True)
    (source,) = folder.glob("*.tar.gz")
    subprocess.run(["tar", "-xzf", source, "-C", folder], check=True)
    unpacked = folder / source.name.removesuffix(".tar.gz")
    subprocess.run([sys.executable, "-c", backend.format("wheel"), folder], cwd=unpacked, check=True)
    return folder


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_a_distribution_works_in_an_environment_of_its_own(built: Path, kind: str, tmp_path: Path) -> None:
    """Installed by pip into a new environment, with the libraries of this one; run from another folder."""
    (file,) = built.glob(kind)
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    scheme = f"{environment}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    # A line of a .pth file adds a folder, but nothing of what the .pth files in it add: not the checkout.
    (Path(scheme) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shell = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "PYTEST"))
    }

    def run(*command: object, code: int = 0) -> str:
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=shell, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    run(python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation", file)
    where = run(python, "-c", "import pipeline; from pipeline.cli.overrides import conf_folder; print(conf_folder())")
    assert Path(where.strip()) == Path(scheme) / "pipeline" / "conf"
    atlas = environment / "bin" / "atlas"
    assert run(atlas, "--version") == f"atlas {pipeline.__version__}\n"
    assert (
        run(python, "-c", "from importlib.metadata import version as v; print(v('neuron-atlas'))").strip()
        == pipeline.__version__
    )
    small = ["model=timm", "model.name=test_efficientnet", "model.weights=null", "model.input_size=32", "layers=convs"]
    small += ["layers.channels='0:1'", "render.steps=2", "render.size=24", "render.margin=2", "engine=inline"]
    run(atlas, "run", *small, "examples.k=2", "data.limit=12", "run.name=a")
    assert (tmp_path / "runs" / "a" / "site" / "index.html").is_file()
    run(atlas, "verify", "runs/a", "run.check=0")


@pytest.mark.long
def test_a_distribution_holds_what_belongs_to_it_and_nothing_else(built: Path) -> None:
    (source,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "pipeline", "conf"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.split():
        assert name in inside
        assert (f"pipeline/{name}" if name.startswith("conf/") else name) in installed
    assert {"LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "pyproject.toml"} <= inside
    kept = ("pipeline/", "conf/")
    beside = {name for name in inside if not name.startswith(kept)}
    assert beside <= {"LICENSE", "NOTICE", "README.md", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert not [name for name in inside | installed if "__pycache__" in name or name.endswith((".h5", ".pyc"))]
