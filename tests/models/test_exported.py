"""Exported programs: ordinary ones are read without trust, and nothing of a crafted one is executed without it."""

import contextlib
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import TinyNet
from torch import Tensor, nn

from pipeline.core.errors import AtlasError
from pipeline.models import exported
from pipeline.models.loading import ModelConfig, load_model


def save(net: nn.Module, path: Path, size: int = 32, strict: bool = False, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = options.pop("dynamic_shapes", ({0: torch.export.Dim("batch")},))
        images = torch.rand(2, 3, size, size)
        torch.export.save(torch.export.export(net.eval(), (images,), dynamic_shapes=dynamic, strict=strict), path)
    return path


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(TinyNet(), tmp_path_factory.mktemp("program") / "net.pt2")


def loaded(path: Path, trust: bool = False) -> nn.Module:
    return load_model(ModelConfig("custom", "mine", target=str(path), input_size=32, trust_checkpoint=trust)).module


def crafted(ordinary: Path, path: Path, /, **members: bytes | Callable[[Any], None]) -> Path:
    """The same archive with some members changed: bytes in their place, or JSON by a function; new ones at the end."""
    names = {"program": "models/model.json", "inputs": "data/sample_inputs/model.pt"}
    names |= {key: f"data/{key}/model_{key}_config.json" for key in ("weights", "constants")}
    changes = {names.get(key, key): value for key, value in members.items()}
    with zipfile.ZipFile(ordinary) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            top, _, name = info.filename.partition("/")
            data, change = old.read(info), changes.pop(name, None)
            if callable(change):
                tree = json.loads(data)
                change(tree)
                data = json.dumps(tree).encode()
            new.writestr(info.filename, data if change is None or callable(change) else change)
        for name, data in changes.items():
            new.writestr(f"{top}/{name}", data)
    return path


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Outer(nn.Module):
    """What exported programs hold besides layers: `no_grad`, sizes, constants, a dict as output, einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = TinyNet(), nn.Linear(5, 3)
        self.register_buffer("table", torch.arange(5.0), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            x = nn.functional.interpolate(x, (x.shape[2] // 2 * 2, x.shape[3]), mode="bilinear")
        y = self.inner(x) + self.table + torch.tensor([0.5])
        return {"out": self.head(y.view(x.shape[0], -1)), "gram": torch.einsum("bi,bj->bij", y, y)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: TinyNet(),
        lambda: Outer(),
        pytest.param(lambda: timm.create_model("test_vit", img_size=32), marks=pytest.mark.long),
        lambda: timm.create_model("test_efficientnet"),
        lambda: torchvision.models.squeezenet1_1(weights=None),
    ],
    ids=["tiny", "outer", "vit", "efficientnet", "squeezenet"],
)
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.long)])
def test_ordinary_programs_need_no_trust(make: Callable[[], nn.Module], strict: bool, tmp_path: Path) -> None:
    net = make()
    path = save(net, tmp_path / "net.pt2", strict=strict)
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        one, two = loaded(path)(images), net.eval()(images)
    one, two = (value["out"] if isinstance(value, dict) else value for value in (one, two))
    assert torch.allclose(one, two, atol=1e-4)


def test_any_size_of_image_needs_no_trust(tmp_path: Path) -> None:
    sides = torch.export.Dim.AUTO
    shapes = ({0: torch.export.Dim("batch"), 2: sides, 3: sides},)
    net = loaded(save(TinyNet(), tmp_path / "net.pt2", dynamic_shapes=shapes))
    assert net(torch.rand(1, 3, 40, 56)).shape == (1, 5)


def first_node(key: str, value: Any) -> Callable[[Any], None]:
    return lambda tree: tree["graph_module"]["graph"]["nodes"][0].update({key: value})


def renamed(tree: Any, name: str) -> None:
    """Another name for the placeholder of the image, wherever it stands."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {(name if k == "x" else k): walk(v) for k, v in value.items()}
        return [walk(v) for v in value] if isinstance(value, list) else name if value == "x" else value

    tree.update(walk(tree))


def a_size(tree: Any, text: str) -> None:
    tree["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = text


def system(tree: Any, marker: Path) -> None:
    """A node that calls `os.system`, which can be reached from torch."""
    node = tree["graph_module"]["graph"]["nodes"][-1]
    command = {"name": "command", "arg": {"as_string": f"touch '{marker}'"}, "kind": 1}
    node |= {"target": "torch.serialization.os.system", "inputs": [command]}


def attacks(marker: Path) -> dict[str, dict[str, Any]]:
    touch = f"__import__('os').system('touch {marker}')"
    opaque = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    tensor = {"path_name": "tensor_0", "is_param": False, "use_pickle": True, "tensor_meta": None}

    def weight(tree: Any) -> None:
        next(iter(tree["config"].values()))["use_pickle"] = True

    enum = json.dumps({"__enum__": True, "fqn": "this:s", "value": 0})
    imported = json.dumps([1, {"type": "builtins.dict", "context": f"[{enum}]", "children_spec": []}])
    return {
        "example inputs": {"inputs": pickled(((Evil(marker),), {}))},
        "old weights": {"data/weights/model.pt": pickled({"a": Evil(marker)})},
        "old constants": {"data/constants/model.pt": pickled({"a": Evil(marker)})},
        "opaque object": {
            "constants": lambda tree: tree["config"].update(a=opaque),
            "data/constants/opaque_obj_0": pickle.dumps(Evil(marker)),
        },
        "pickled constant": {
            "constants": lambda tree: tree["config"].update(a=tensor),
            "data/constants/tensor_0": pickled(Evil(marker)),
        },
        "pickled weight": {"weights": weight, "data/weights/weight_0": pickled(Evil(marker))},
        "size": {"program": lambda tree: a_size(tree, touch)},
        "size of a symbol": {"program": lambda tree: a_size(tree, f"Symbol({touch})")},
        "size of a text": {"program": lambda tree: a_size(tree, f"Add({touch!r}, 1)")},
        "size of an attribute": {"program": lambda tree: a_size(tree, "Add.__init__.__globals__")},
        "name": {"program": lambda tree: renamed(tree, f"x={touch}")},
        "operator": {"program": lambda tree: system(tree, marker)},
        "operator of TorchScript": {"program": first_node("target", "torch.ops.aten.save.default")},
        "operator on files": {"program": first_node("target", "torch.ops.aten.from_file.default")},
        "operator of an extension": {"program": first_node("target", "#any:name")},
        "guard": {"program": lambda tree: tree.update(guards_code=[touch])},
        "comment": {"program": first_node("metadata", {"stack_trace": f"# \r{touch}"})},
        "metadata": {"program": first_node("metadata", {"unknown": "x"})},
        "imported type": {
            "program": lambda tree: tree["graph_module"]["module_call_graph"][0]["signature"].update(out_spec=imported)
        },
        "named tuple": {
            "program": lambda tree: tree["graph_module"].update(treespec_namedtuple_fields={"a": {"field_names": []}})
        },
        "new key": {"program": lambda tree: tree.update(later="text")},
        "compiled library": {"data/aotinductor/model/model.so": b"\x7fELF"},
        "another program": {"models/other.json": b"{}"},
    }


@pytest.mark.parametrize("attack", sorted(attacks(Path())))
def test_nothing_of_a_crafted_program_is_executed(attack: str, program: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    path = crafted(program, tmp_path / "net.pt2", **attacks(marker)[attack])
    with pytest.raises(AtlasError, match=r"may run code of whoever made it.* model\.trust_checkpoint=true"):
        loaded(path)
    assert not marker.exists()


@pytest.mark.parametrize("attack", ["example inputs", "old weights", "opaque object", "size"])
def test_the_crafted_programs_are_no_blanks(attack: str, program: Path, tmp_path: Path) -> None:
    """With trust, the same file is executed: the setting does what it says, and the test above tests something."""
    marker = tmp_path / "marker"
    path = crafted(program, tmp_path / "net.pt2", **attacks(marker)[attack])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(AtlasError):
            loaded(path, trust=True)
    assert marker.exists()


def test_an_archive_that_is_changed_in_nothing_is_read(program: Path, tmp_path: Path) -> None:
    same = crafted(program, tmp_path / "net.pt2")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded(same)(images), loaded(program)(images))


def test_two_members_of_one_name_and_the_old_format_are_refused(program: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = crafted(program, tmp_path / "net.pt2")
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/models/model.json", "{}")
        with pytest.raises(AtlasError, match=r"model\.trust_checkpoint=true"):
            loaded(path)
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("version", "8.2")
        archive.writestr("serialized_exported_program.json", "{}")
        archive.writestr("serialized_state_dict.pt", pickled({"a": Evil(marker)}))
    with pytest.raises(AtlasError, match=r"before 2\.8.*model\.trust_checkpoint=true"):
        loaded(tmp_path / "old.pt2")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Add(FloorDiv(Add(Symbol('s0', integer=True), Integer(-1)), Integer(4)), Integer(1))", True),
        ("2*s0 + Max(1, u1)//3", True),
        ("Float('0.5', precision=53)", True),
        ("s0.free_symbols", False),
        ("(lambda: s0)()", False),
        ("[s0 for s0 in (1,)]", False),
        ("Add('s0', 1)", False),
        ("Symbol(f'{s0}')", False),
        ("Symbol(name='s0(1)')", False),
        ("Add(*s0)", False),
        ("exec", False),
        ("s0; s1", False),
    ],
)
def test_sizes_are_arithmetic(text: str, size: bool) -> None:
    assert exported._is_size_expression(text) is size
