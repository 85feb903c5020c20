"""Which files a network of the user's own depends on: what counts as a change, and that a change is read again."""

import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import pipeline
from pipeline.cli.main import main
from pipeline.core import user_code
from pipeline.layers.finding import capture, enumerate_layers
from pipeline.models.loading import Model, ModelConfig, load_model

BLOCKS = """
from torch import nn
from scales import SCALE
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
    def forward(self, x):
        return self.conv(x).relu() * SCALE
"""
NET = """
from torch import nn
{imports}
def build():
    return nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
"""


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    """Every test begins with the modules and the import path of a process that has loaded no network."""
    modules, path, finders = set(sys.modules), list(sys.path), list(sys.meta_path)
    yield
    for name in set(sys.modules) - modules:
        file = user_code.file_of(sys.modules[name])
        if file is None or not user_code.installed(file):
            del sys.modules[name]
    sys.path[:], sys.meta_path[:] = path, finders


def write(folder: Path, **files: str) -> Path:
    """Python files by name, `__` for a slash."""
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/') if name.strip('_') == name else name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def network(folder: Path, imports: str = "from blocks import Block", scale: float = 1.0) -> Path:
    return write(folder, net=NET.format(imports=imports), blocks=BLOCKS, scales=f"SCALE = {scale}\n")


def loaded(target: str | Path, **settings: Any) -> Model:
    target = f"{target}/net.py:build" if isinstance(target, Path) else target
    return load_model(ModelConfig("custom", "mine", **{"target": target, "input_size": 16, **settings}))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def response(model: Model) -> Tensor:
    """The first block's maps of one image, by a plain forward pass."""
    with torch.no_grad():
        return model.module.get_submodule("0")(torch.full((1, 3, 16, 16), 0.5))


def test_an_edit_two_imports_away_is_another_network_and_is_read_again(tmp_path: Path) -> None:
    network(tmp_path)
    first = loaded(tmp_path)
    edit(tmp_path / "scales.py", "1.0", "5.0")
    second = loaded(tmp_path)
    assert second.digest != first.digest
    assert torch.allclose(response(second), 5 * response(first)) and response(first).max() > 0
    edit(tmp_path / "scales.py", "5.0", "1.0  # as before")
    edit(tmp_path / "blocks.py", "self.conv(x).relu()", "( self.conv(x).relu() )")
    assert loaded(tmp_path).digest == first.digest


def test_neither_the_place_nor_the_file_of_the_target_counts(tmp_path: Path) -> None:
    network(tmp_path / "a")
    network(tmp_path / "b" / "deeper")
    (tmp_path / "b" / "deeper" / "net.py").rename(tmp_path / "b" / "deeper" / "other.py")
    here, there = loaded(tmp_path / "a"), loaded(f"{tmp_path}/b/deeper/other.py:build")
    assert here.digest == there.digest


def test_what_the_process_did_before_makes_no_difference(tmp_path: Path) -> None:
    """The same digest in a fresh process as in one that has loaded other targets and the same one already."""
    network(tmp_path / "a")
    network(tmp_path / "b", scale=3.0)
    code = (
        "import sys; from pipeline.models.loading import ModelConfig, load_model\n"
        "print(load_model(ModelConfig('custom', 'mine', target=sys.argv[1], input_size=16)).digest)"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code, f"{tmp_path}/a/net.py:build"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert loaded(tmp_path / "b").digest != fresh
    assert [loaded(tmp_path / "a").digest for _ in range(2)] == [fresh, fresh]
    import scales  # type: ignore[import-not-found]  # noqa: F401

    assert loaded(tmp_path / "a").digest == fresh


@pytest.mark.parametrize("package", [False, True])
def test_two_folders_with_files_of_the_same_name(tmp_path: Path, package: bool) -> None:
    """Also where one folder's `parts` is a package with an __init__ and the other's is a plain folder."""
    for name, scale in (("a", 1.0), ("b", 3.0)):
        folder = tmp_path / name
        if package:
            write(folder, net=NET.format(imports="from parts.blocks import Block"))
            write(folder, parts__blocks=BLOCKS.replace("from scales", "from parts.scales"))
            write(folder, parts__scales=f"SCALE = {scale}\n")
            if name == "a":
                (folder / "parts" / "__init__.py").write_text("")
        else:
            network(folder, scale=scale)
    one, two, again = loaded(tmp_path / "a"), loaded(tmp_path / "b"), loaded(tmp_path / "a")
    assert torch.allclose(response(two), 3 * response(one)) and torch.equal(response(again), response(one))
    assert one.digest == again.digest != two.digest


def test_imports_inside_functions_count_and_work_when_the_network_runs(tmp_path: Path) -> None:
    late = BLOCKS.replace("from scales import SCALE\n", "").replace(
        "        return self", "        from scales import SCALE\n        return self"
    )
    write(network(tmp_path), blocks=late)
    first = loaded(tmp_path)
    layers = enumerate_layers(first)  # runs it
    assert "scales" in sys.modules
    with capture(first, layers[:1]) as forward, torch.no_grad():
        assert forward(torch.rand(1, 3, 16, 16))
    before = response(first)
    edit(tmp_path / "scales.py", "1.0", "5.0")
    second = loaded(tmp_path)
    assert second.digest != first.digest and torch.allclose(response(second), 5 * before)


def test_an_import_path_covers_its_package(tmp_path: Path) -> None:
    root = tmp_path / "my_package"
    write(root, nets=NET.format(imports="from .blocks import Block"), blocks=BLOCKS.replace("scales", "..scales", 1))
    edit(root / "blocks.py", "from ..scales", "from .sub.scales")
    write(root / "sub", scales="SCALE = 1.0\n", __init__="from . import scales\n")
    (root / "__init__.py").write_text("")
    where = {"folder": str(tmp_path)}
    first = loaded("my_package.nets:build", **where)
    (root / "sub" / "scales.py").write_text("SCALE = 5.0\n")
    second = loaded("my_package.nets:build", **where)
    assert second.digest != first.digest and torch.allclose(response(second), 5 * response(first))
    write(root, unused="SCALE = 9\n")
    assert loaded("my_package.nets:build", **where).digest == second.digest
    edit(root / "__init__.py", "", "import my_package.unused\n")
    assert loaded("my_package.nets:build", **where).digest != second.digest


def test_a_development_install_counts_and_an_installed_package_does_not(tmp_path: Path) -> None:
    """The same package, on the import path from a checkout, and from a folder for packages."""
    for place, counts in (("checkout", True), ("lib/site-packages", False)):
        network(tmp_path / place / "lent")
        (tmp_path / place / "lent" / "__init__.py").write_text("")
        edit(tmp_path / place / "lent" / "blocks.py", "from scales", "from .scales")
        target = write(tmp_path / f"of {counts}", net=NET.format(imports="from lent.blocks import Block"))
        sys.path.insert(0, str(tmp_path / place))
        first = loaded(target)
        edit(tmp_path / place / "lent" / "scales.py", "1.0", "5.0")
        second = loaded(target)
        assert (second.digest != first.digest) is counts
        # No module of an installed package is ever imported again.
        assert torch.allclose(response(second), (5 if counts else 1) * response(first))
        sys.path.remove(str(tmp_path / place))
        for name in [n for n in sys.modules if n.partition(".")[0] == "lent"]:
            del sys.modules[name]


@pytest.mark.parametrize(
    "how",
    [
        "import importlib\nBlock = importlib.import_module('blocks').Block",
        "Block = __import__('blocks').Block",
        "import importlib\nname = 'blo' + 'cks'\nBlock = importlib.import_module(name).Block",
        "try:\n    from no_such_package import Block\nexcept ImportError:\n    from blocks import Block",
        "from blocks import *",
        "import functools\nfrom blocks import Block as Plain\nclass Block(Plain):\n    pass",
    ],
)
def test_other_ways_to_import(tmp_path: Path, how: str) -> None:
    network(tmp_path, how)
    first = loaded(tmp_path)
    edit(tmp_path / "scales.py", "1.0", "5.0")
    second = loaded(tmp_path)
    assert second.digest != first.digest and torch.allclose(response(second), 5 * response(first))


def test_the_class_counts_where_no_statement_imports_it(tmp_path: Path) -> None:
    """A registry that another file fills: `getattr` and `sys.modules` are no import statements."""
    network(tmp_path / "net", "Block = __builtins__['registered']()")
    write(tmp_path / "elsewhere", odd_blocks=BLOCKS.replace("from scales import SCALE", "SCALE = 1.0"))

    def registered() -> type:
        sys.path.insert(0, str(tmp_path / "elsewhere"))
        import odd_blocks  # type: ignore[import-not-found]

        return odd_blocks.Block

    import builtins

    builtins.registered = registered  # type: ignore[attr-defined]
    try:
        first = loaded(tmp_path / "net")
        edit(tmp_path / "elsewhere" / "odd_blocks.py", "SCALE = 1.0", "SCALE = 5.0")
        second = loaded(tmp_path / "net")
    finally:
        del builtins.registered  # type: ignore[attr-defined]
    assert second.digest != first.digest


def test_scripts_and_type_checkers_do_not_count(tmp_path: Path) -> None:
    network(tmp_path)
    more = (
        "\nif __name__ == '__main__':\n    import train\n\nimport typing\nif typing.TYPE_CHECKING:\n    import hints\n"
    )
    (tmp_path / "net.py").write_text((tmp_path / "net.py").read_text() + more)
    write(tmp_path, train="EPOCHS = 3\n", hints="A = int\n")
    first = loaded(tmp_path)
    write(tmp_path, train="EPOCHS = 4\n", hints="A = str\n")
    assert loaded(tmp_path).digest == first.digest


@pytest.mark.parametrize(
    "wrapper",
    [
        "import functools\nbuild = functools.partial(build)",
        "import torch\nbuild = torch.no_grad()(build)",
        "import functools\ndef seeded(f):\n    @functools.wraps(f)\n    def inner():\n        return f()\n"
        "    return inner\nbuild = seeded(build)",
        "class Builder:\n    def __call__(self):\n        return plain()\nplain, build = build, Builder()",
        "from torch.nn.utils import parametrize\nplain = build\nclass Half(nn.Module):\n    def forward(self, w):\n"
        "        return w / 2\ndef build():\n    net = plain()\n"
        "    parametrize.register_parametrization(net[0].conv, 'weight', Half())\n    return net",
    ],
)
def test_decorated_builders_and_wrapped_modules(tmp_path: Path, wrapper: str) -> None:
    network(tmp_path)
    (tmp_path / "net.py").write_text((tmp_path / "net.py").read_text() + wrapper + "\n")
    first = loaded(tmp_path)
    edit(tmp_path / "scales.py", "1.0", "5.0")
    assert loaded(tmp_path).digest != first.digest


def test_a_builder_of_another_file_counts(tmp_path: Path) -> None:
    write(network(tmp_path), front="import sys\nsys.path.append('{}')\n".format(tmp_path / "back"))
    write(tmp_path / "back", behind=NET.format(imports="from blocks import Block"))
    (tmp_path / "front.py").write_text((tmp_path / "front.py").read_text() + "build = __import__('behind').build\n")
    first = loaded(f"{tmp_path}/front.py:build")
    edit(tmp_path / "back" / "behind.py", "nn.Flatten()", "nn.Sigmoid(), nn.Flatten()")
    assert loaded(f"{tmp_path}/front.py:build").digest != first.digest


def test_a_class_without_a_file_counts_by_its_compiled_code(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = BLOCKS.replace("from scales import SCALE", "SCALE = 1.0").replace("* SCALE", "* {}")
    digests = []
    for factor in ("1.0", "1.0", "5.0"):
        space = types.ModuleType("notebook")
        exec(source.format(factor), space.__dict__)
        network(tmp_path, "import sys\nBlock = sys.modules['notebook'].Block")
        sys.modules["notebook"] = space
        with caplog.at_level("INFO", "pipeline"):
            digests.append(loaded(tmp_path).digest)
        for name in [n for n in sys.modules if n.startswith(("atlas_target_", "notebook"))]:
            del sys.modules[name]
    assert digests[0] == digests[1] != digests[2]
    assert "notebook.Block has no source file" in caplog.text


def test_names_that_an_import_may_mean() -> None:
    text = b"import a.b, c\nfrom . import d\nfrom ..e import f as g\nfrom h import *\nfrom .... import out\n"
    assert user_code.imports(text, "p.q") == (("a.b", "c", "h", "p.e.f", "p.q.d"), False)
    assert user_code.imports(b"def f(x):\n    __import__(x)\n", "") == ((), True)
    assert user_code.imports(b"no python", "") == ((), False)


def test_libraries_are_no_user_code() -> None:
    assert user_code.installed(Path(torch.__file__)) and user_code.installed(Path(pipeline.__file__))
    assert user_code.installed(Path(types.__file__)) and not user_code.installed(Path(__file__))
    found = loaded("torchvision.models:resnet18")
    assert found.digest == loaded("torchvision.models:resnet18").digest


# ---- whole runs


@pytest.fixture
def run(tmp_path: Path) -> list[str]:
    (tmp_path / "photos").mkdir()
    for i in range(4):
        image = np.random.default_rng(i).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
    return [
        "model=custom", f"model.target={tmp_path}/net.py:build", "model.input_size=16", "layers=convs",
        "layers.channels='0:2'", "render.steps=3", "render.margin=2", "engine=inline", "engine.precision=float32",
        "examples.k=2", "data=folder", f"data.root={tmp_path}/photos", f"run.root={tmp_path}", "run.name=mine",
    ]  # fmt: skip


def activation(folder: Path, unit: str = "0") -> float:
    with pipeline.open_atlas(folder) as atlas:
        units = atlas.units()
    return float(units[(units["layer"] == unit) & (units["channel"] == 0)]["activation"].iloc[0])


@pytest.mark.long
def test_an_edited_import_is_told_by_verify_and_everything_is_made_again(
    tmp_path: Path, run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    network(tmp_path)
    run = [*run, "layers.include=['0.conv','3']"]
    edit(tmp_path / "blocks.py", "self.conv(x).relu() * SCALE", "(self.conv(x) * SCALE).relu()")
    edit(tmp_path / "blocks.py", "nn.Conv2d(3, 4, 3, padding=1)", "nn.Conv2d(3, 4, 3, padding=PADDING)")
    (tmp_path / "scales.py").write_text("SCALE = 1.0\nPADDING = 1\n")
    edit(tmp_path / "blocks.py", "import SCALE", "import SCALE, PADDING")
    assert main(["run", *run]) == 0
    before = activation(tmp_path / "mine", "3")
    assert main(["verify", str(tmp_path / "mine"), "run.trust=true"]) == 0
    capsys.readouterr()
    edit(tmp_path / "scales.py", "1.0", "5.0")
    assert main(["verify", str(tmp_path / "mine"), "run.trust=true"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "network" in printed and "its weights or its code differ from those that the atlas was computed from" in printed
    )
    # The message says what to do.
    assert main(["run", *run]) == 0
    assert "Nothing is missing" not in capsys.readouterr().err
    assert activation(tmp_path / "mine", "3") != before
    assert main(["verify", str(tmp_path / "mine"), "run.trust=true"]) == 0


def test_verify_of_a_network_that_has_lost_its_layers(
    tmp_path: Path, run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    network(tmp_path)
    assert main(["run", *run]) == 0
    edit(tmp_path / "blocks.py", "self.conv", "self.renamed")
    edit(tmp_path / "blocks.py", "= nn.Conv2d", " = nn.Conv2d")
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "mine"), "run.trust=true"]) == 1
    assert "its code differ from those" in " ".join(capsys.readouterr().out.split())


def test_verify_computes_activations_again(tmp_path: Path, run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A builder that reads its numbers from a data file: no digest knows, and the images may even be the same."""
    network(tmp_path)
    (tmp_path / "scales.py").write_text(
        "import json, pathlib\nSCALE = json.loads(pathlib.Path(__file__).with_suffix('.json').read_text())\n"
    )
    (tmp_path / "scales.json").write_text("1.0")
    run = [*run, "layers=all", "layers.include=['0']", "run.check=2"]
    assert main(["run", *run]) == 0
    assert main(["verify", str(tmp_path / "mine"), "run.check=2", "run.trust=true"]) == 0
    capsys.readouterr()
    (tmp_path / "scales.json").write_text("1.03")
    for name in [n for n in sys.modules if n == "scales" or n == "blocks" or n.startswith("atlas_target_")]:
        del sys.modules[name]  # another process
    assert main(["verify", str(tmp_path / "mine"), "run.check=2", "run.trust=true"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "0:0 the network's activation on the stored image is" in printed, printed
