"""Members of registries from the user's own files, in digests, messages and whole runs."""

from pathlib import Path

import pytest
import torch

import pipeline
from pipeline.cli.compose import compose
from pipeline.cli.main import main
from pipeline.core import plugins
from pipeline.core.errors import AtlasError
from pipeline.core.registry import canonical

SATURATION = '''
import dataclasses

from torch import Tensor

from pipeline.images.image_regularizers import ImageRegularizer


@dataclasses.dataclass(frozen=True)
class Saturation(ImageRegularizer):
    """Sum of the amounts by which values are within `edge` of black or white."""

    weight: float = 0.5
    edge: float = 0.05

    def value(self, images: Tensor, reference: Tensor) -> Tensor:
        """Return the sum over pixels, (B,)."""
        return (self.edge - images).relu().sum((1, 2, 3)) + (images - 1 + self.edge).relu().sum((1, 2, 3))


class NoDataclass(ImageRegularizer):
    pass


@dataclasses.dataclass(frozen=True)
class NoRegularizer:
    pass
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_regularizers.py"
    path.write_text(SATURATION)
    return path


def test_a_class_of_a_file_is_a_member(file: Path) -> None:
    (penalty,) = compose([f"render.penalties=[{file}:Saturation]"]).config.render.penalties
    images = torch.stack([torch.full((3, 4, 4), 0.5), torch.ones(3, 4, 4)])
    assert penalty.value(images, images).tolist() == pytest.approx([0.0, 48 * 0.05])
    overrides = ["render=tv", f"render.penalties=[{{name: '{file}:Saturation', weight: 2}}]"]
    assert [p.weight for p in compose(overrides).config.render.penalties] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Saturatoin", "has no 'Saturatoin'. Nearest: Saturation"),
        ("NoDataclass", r"must be decorated with @dataclasses\.dataclass\(frozen=True\)"),
        ("NoRegularizer", "must be a class derived from pipeline.images.image_regularizers.ImageRegularizer"),
    ],
)
def test_a_class_that_cannot_be_a_member_is_refused(file: Path, name: str, message: str) -> None:
    with pytest.raises(AtlasError, match=message):
        compose([f"render.penalties=[{file}:{name}]"])


def test_wrong_settings_files_and_modules_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(AtlasError, match="egde is not a setting"):
        compose([f"render.penalties=[{{name: '{file}:Saturation', egde: 2}}]"])
    with pytest.raises(AtlasError, match="there is no file"):
        compose([f"render.penalties=[{tmp_path}/none.py:Saturation]"])
    file.write_text("import no_such_library\n")
    with pytest.raises(AtlasError, match="can't be imported: ModuleNotFoundError"):
        compose([f"render.penalties=[{file}:Saturation]"])
    with pytest.raises(AtlasError, match="can't be imported: ModuleNotFoundError"):
        compose(["render.penalties=[no_such_package.members:Saturation]"])


def test_the_digest_follows_the_code_and_not_the_place(file: Path, tmp_path: Path) -> None:
    def identity(path: Path) -> object:
        return canonical(compose([f"render.penalties=[{path}:Saturation]"]).config.render.penalties)

    first = identity(file)
    other = tmp_path / "elsewhere" / file.name
    other.parent.mkdir()
    other.write_text(SATURATION + "\n# a comment\n")
    assert identity(other) == first
    other.write_text(SATURATION.replace("- 1 + self.edge", "- 1 + 2 * self.edge"))
    assert identity(other) != first
    # A file that the class's own file imports counts as well.
    (tmp_path / "helper_of_the_member.py").write_text("EDGE = 0.05\n")
    file.write_text("import helper_of_the_member\n" + SATURATION)
    second = identity(file)
    (tmp_path / "helper_of_the_member.py").write_text("EDGE = 0.06\n")
    assert identity(file) not in (first, second)


def test_an_edited_helper_is_imported_again(file: Path, tmp_path: Path) -> None:
    """A notebook loads a member twice in one process: digest and code must both be of the files as they are."""
    helper = tmp_path / "helper_with_an_edge.py"
    file.write_text(
        "from helper_with_an_edge import EDGE\n" + SATURATION.replace("edge: float = 0.05", "edge: float = EDGE")
    )
    edges = []
    for edge in (0.05, 0.25):
        helper.write_text(f"EDGE = {edge}\n")
        (penalty,) = compose([f"render.penalties=[{file}:Saturation]"]).config.render.penalties
        edges.append((penalty.edge, canonical(penalty)["source of the class"]))
    assert [edge for edge, _ in edges] == [0.05, 0.25] and edges[0][1] != edges[1][1]


def test_code_named_in_another_runs_folder_is_not_loaded(file: Path) -> None:
    with plugins.forbidden(), pytest.raises(AtlasError, match="is not loaded from the folder of another run"):
        compose([f"render.penalties=[{file}:Saturation]"])


@pytest.mark.filterwarnings("ignore")  # those of Ray
@pytest.mark.long
def test_a_run_with_a_class_of_the_user(tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named as in the documentation, by a file in the working directory; workers of Ray get the class, not the file."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "my_regularizers.py").write_text(SATURATION)
    monkeypatch.chdir(home)
    overrides = ["layers.include=[conv_stem]", "render.penalties=[my_regularizers.py:Saturation]"]
    assert main(["run", *tiny_run, *overrides]) == 0
    assert main(["run", *tiny_run, *overrides, "engine=ray", "engine.workers=1", "run.name=ray"]) == 0
    with pipeline.open_atlas(tmp_path / "tiny") as inline, pipeline.open_atlas(tmp_path / "ray") as ray:
        assert set(inline.units().status) <= {"limit", "converged", "retried"}
        for channel in inline["conv_stem"].channels:
            difference = inline["conv_stem"].image(channel).astype(int) - ray["conv_stem"].image(channel)
            assert abs(difference).max() <= 1
        ours, theirs = inline["conv_stem"].examples(), ray["conv_stem"].examples()
        assert ours is not None and theirs is not None and (ours.index == theirs.index).all()
    assert "my_regularizers.py:Saturation" in (tmp_path / "tiny" / "config.yaml").read_text()
    assert "Saturation" in (tmp_path / "tiny" / "site" / "method.html").read_text()


def test_a_reader_of_the_user(tiny_run: list[str], tmp_path: Path, photo_folder: Path) -> None:
    reader = tmp_path / "my_reader.py"
    reader.write_text(
        "from pathlib import Path\n"
        "from pipeline.data.readers.base import DatasetImage, Listing\n\n\n"
        "def every_second(config):\n"
        "    files = sorted(p.relative_to(config.root).as_posix() for p in Path(config.root).rglob('*.png'))\n"
        "    return Listing(tuple(DatasetImage(name, '', i) for i, name in enumerate(files[::2])), {'': config.root})\n"
    )
    from pipeline.data.datasets import list_dataset

    config = compose([*tiny_run, f"data.source='{reader}:every_second'", f"data.root={photo_folder}"]).config.data
    everything = list_dataset(compose([*tiny_run, "data=folder", f"data.root={photo_folder}"]).config.data)
    assert len(list_dataset(config).images) == -(-sum(i.path.endswith(".png") for i in everything.images) // 2)
