"""The driver holds the second pass of a large dataset in parts."""

import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.runs.localized_arrays import LocalizedArrays
from pipeline.store import shards
from pipeline.store.hdf5 import write_jpegs
from pipeline.store.shards import DamagedShardError, Shard

PARTS, SIZE = 8, 1_000_000


@pytest.fixture
def parts(tmp_path: Path) -> list[Shard]:
    found = []
    for i in range(PARTS):
        random = np.random.default_rng(i)
        arrays = {
            "shown/offset": np.array([0, 10 * i, SIZE]),
            "shown/jpeg": random.integers(0, 255, SIZE).astype(np.uint8),
            "0/map": random.normal(size=(3, 2)).astype(np.float32),
            "1/map": random.normal(size=(2, 2)).astype(np.float32),
        }
        shards.write(tmp_path / f"{i}.h5", {"digest": "x"}, arrays)
        shard = shards.read(tmp_path / f"{i}.h5")
        assert shard is not None
        found.append(shard)
    return found


def test_arrays_are_joined_and_offsets_go_on(parts: list[Shard]) -> None:
    joined = LocalizedArrays(parts)
    assert sorted(joined) == ["0/map", "1/map", "shown/jpeg", "shown/offset"]
    for name in ("0/map", "1/map", "0/map", "shown/jpeg"):
        assert np.array_equal(joined[name], np.concatenate([shard.get(name)[name] for shard in parts]))
    offsets = joined["shown/offset"]
    assert len(offsets) == 2 * PARTS + 1 and offsets[0] == 0 and (offsets[2::2] == SIZE * np.arange(1, PARTS + 1)).all()
    assert offsets[3] == SIZE + 10
    assert "2/map" not in joined and joined.get("0/jpeg") is None
    assert list(LocalizedArrays([])) == []
    parts[3].path.write_bytes(b"damaged")
    with pytest.raises(DamagedShardError):
        LocalizedArrays(parts)["0/map"]


def test_shown_images_are_written_in_the_memory_of_one_part(parts: list[Shard], tmp_path: Path) -> None:
    joined = LocalizedArrays(parts)
    with h5py.File(tmp_path / "atlas.h5", "w") as file:
        tracemalloc.start()
        try:
            write_jpegs(file.create_group("shown"), joined["shown/offset"], joined.pieces("shown/jpeg"))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert SIZE <= peak < 3 * SIZE
        assert np.array_equal(file["shown/jpeg"], joined["shown/jpeg"])
        whole = file.create_dataset("whole", data=joined["shown/jpeg"], chunks=True, fletcher32=True)
        assert file["shown/jpeg"].chunks == whole.chunks and file["shown/jpeg"].fletcher32
