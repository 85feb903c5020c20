"""Atlases that former versions of this program wrote: read, with what they lack left out, or refused.

schema_2.tar.xz to schema_4.tar.xz are atlas.h5 and config.yaml of runs of the commits 87b73dc, 9d5085c and c35babc:

    atlas run model=timm model.name=test_efficientnet model.weights=null model.input_size=32 layers=convs \
        layers.include=[conv_stem,conv_head,classifier] layers.channels="'0:2'" render.size=24 render.margin=2 \
        render.steps=2 examples.k=2 data=folder data.root=photos engine=inline
"""

import csv
import shutil
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

import pipeline
from pipeline.cli.main import main
from pipeline.core.errors import AtlasError
from pipeline.core.metric_specs import METRICS
from pipeline.store.reader import OLDEST_SCHEMA_VERSION, SCHEMA_VERSION

FORMER = range(OLDEST_SCHEMA_VERSION, SCHEMA_VERSION)
LAYERS = ("conv_stem", "conv_head", "classifier")


def unpacked(version: int, to: Path) -> Path:
    with tarfile.open(Path(__file__).with_name(f"schema_{version}.tar.xz")) as archive:
        for name in ("run/atlas.h5", "run/config.yaml"):
            member = archive.extractfile(name)
            assert member is not None
            (to / name).parent.mkdir(exist_ok=True)
            (to / name).write_bytes(member.read())
    return to / "run"


def schema_version(folder: Path) -> int:
    with h5py.File(folder / "atlas.h5") as file:
        return int(file.attrs["schema_version"])


@pytest.mark.parametrize("version", FORMER)
def test_an_atlas_of_a_former_version_is_read(version: int, tmp_path: Path) -> None:
    folder = unpacked(version, tmp_path)
    assert schema_version(folder) == version
    with pipeline.open_atlas(folder) as atlas:
        assert atlas.layers == LAYERS
        units = atlas.units()
        assert list(units["channel"]) == [0, 1] * 3 and set(units["status"]) == {"limit", "retried"}
        for layer in atlas:
            assert layer.image(1).shape == (24, 24, 3) and layer.image(1).std() > 1
            best = layer.examples("max")
            assert best.value.shape == (2, 2) and (np.diff(best.value, axis=1) <= 0).all()
            assert np.isfinite(layer.stats()["max"]).all()
            # What the version wrote in another meaning is left out, not shown as if it were the present one.
            later = {metric.name for metric in METRICS if metric.since > version}
            assert "transfer" in later and not later & layer.measurements().keys()


@pytest.mark.parametrize("version", FORMER)
def test_commands_take_an_atlas_of_a_former_version(version: int, tmp_path: Path) -> None:
    folder = unpacked(version, tmp_path)
    assert main(["verify", str(folder), "run.check=0"]) == 0
    assert main(["export", str(folder), "--csv"]) == 0
    with (folder / "units.csv").open() as handle:
        assert len(list(csv.DictReader(handle))) == 6
    assert main(["site", str(folder)]) == 0
    assert (folder / "site" / "index.html").is_file()
    assert schema_version(folder) == version  # none of them writes atlas.h5


@pytest.mark.long
@pytest.mark.parametrize("version", FORMER)
def test_a_run_of_a_former_version_goes_on_and_writes_the_present_one(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unpacked(version, tmp_path)
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        label = tmp_path / "photos" / f"label {i % 3}"
        label.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 6, 3), np.uint8))
        image.resize((32, 32), Image.Resampling.BICUBIC).save(label / f"{i:03d}.png")
    settings = [
        "run", "model=timm", "model.name=test_efficientnet", "model.weights=null", "model.input_size=32",
        "layers=convs", f"layers.include=[{','.join(LAYERS)}]", "layers.channels='0:2'", "render.size=24",
        "render.margin=2", "render.steps=2", "examples.k=2", "data=folder", "data.root=photos",
        f"run.root={tmp_path}", "run.name=run", "engine=inline",
    ]  # fmt: skip
    before = (folder / "atlas.h5").read_bytes()
    # Defaults have changed since: said, setting by setting, before anything is written.
    assert main(settings) == 2
    told = capsys.readouterr().err
    assert "render.objective.name: 'channel' → 'auto'" in told and "run.update=true" in told
    assert (folder / "atlas.h5").read_bytes() == before
    assert main([*settings, "run.update=true"]) == 0
    assert schema_version(folder) == SCHEMA_VERSION
    with pipeline.open_atlas(folder) as atlas:
        assert len(atlas.units()) == 6 and "transfer" in atlas["conv_head"].measurements()
    assert main(["verify", str(folder), "run.check=0"]) == 0


@pytest.mark.parametrize("version", [OLDEST_SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
def test_an_unknown_version_is_refused_by_every_command(
    version: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unpacked(4, tmp_path)
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    with h5py.File(folder / "atlas.h5", "r+") as file:
        file.attrs["schema_version"] = version
    advice = "Update it." if version > SCHEMA_VERSION else "Read it with the version that wrote it"
    with pytest.raises(AtlasError, match=f"schema version {version}; this program reads .*{SCHEMA_VERSION}.*{advice}"):
        pipeline.open_atlas(folder)
    kept = (folder / "atlas.h5").read_bytes()
    for command in (["site", folder], ["export", folder, "--csv"], ["compare", folder, other]):
        assert main([str(part) for part in command]) == 2, command
        assert f"schema version {version}" in capsys.readouterr().err, command
    assert (folder / "atlas.h5").read_bytes() == kept
