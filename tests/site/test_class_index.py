"""The classes of a small atlas whose effects and connections are known."""

from pathlib import Path

import h5py
import numpy as np
from test_site import LABELS, write_atlas

from pipeline.site.context.layer_summary import Catalogue, summarize
from pipeline.site.data.class_index import MOVING, ClassEntry, class_entries
from pipeline.store.hdf5 import write_array
from pipeline.store.reader import open_atlas

IMAGES = 25


def write_known_effects(file: h5py.File) -> None:
    """Three ablated units of stem, over 25 images.

    Unit 1 raises goldfish by 0.5 ± 0.1, unit 3 lowers it by 0.7 ± 0.1, and unit 5 raises it by 0.9, but not
    significantly. Nothing moves the other classes, but for a rounding error of unit 1 that is the same in all images.
    Unit 5 of stem, and unit 0, are the inputs of blocks.0.conv.
    """
    mean, deviation = np.zeros((3, len(LABELS)), np.float32), np.full((3, len(LABELS)), 0.1, np.float32)
    mean[:, 1] = 0.5, -0.7, 0.9
    deviation[2, 1] = 9
    mean[0, 2], deviation[0, 2] = 3e-8, 0
    effects = "layers/stem/effects"
    write_array(file, f"{effects}/attribution", np.zeros((6, IMAGES), np.float32))
    write_array(file, f"{effects}/mean", np.zeros(6, np.float32))
    write_array(file, f"{effects}/size", np.zeros(6, np.float32))
    write_array(file, f"{effects}/ablation/channel", np.array([1, 3, 5], np.int32))
    for replacement in ("zero", "mean"):
        group = f"{effects}/ablation/{replacement}"
        write_array(file, f"{group}/top", np.zeros((3, IMAGES), np.float32))
        write_array(file, f"{group}/mean", mean)
        write_array(file, f"{group}/sd", deviation)


def entries_of(path: Path) -> dict[str, ClassEntry]:
    with open_atlas(path) as atlas:
        views = list(atlas)
        catalogue = Catalogue.of(atlas)
        layers = [summarize(view, order, catalogue.classes) for order, view in enumerate(views)]
        ranks = [np.arange(len(view.channels)) + 100 for view in views]
        return {entry.name: entry for entry in class_entries(views, layers, ranks, catalogue)}


def test_units_that_move_a_class(tmp_path: Path) -> None:
    path = write_atlas(tmp_path / "atlas.h5")
    before = entries_of(path)
    assert not any(entry.effects for entry in before.values())
    with h5py.File(path, "r+") as file:
        write_known_effects(file)
    entries = entries_of(path)
    assert {name for name, entry in entries.items() if entry.effects} == {"goldfish"}
    half = 1.96 * 0.1 / 5
    ((order, units),) = entries["goldfish"].effects
    assert order == 0 and [unit[:2] for unit in units] == [[3, 103], [1, 101]]  # the larger change first
    expected = [[-0.7, -0.7 - half, -0.7 + half], [0.5, 0.5 - half, 0.5 + half]]
    np.testing.assert_allclose([unit[2:] for unit in units], expected, atol=1e-4)


def test_only_so_many_units_are_listed(tmp_path: Path) -> None:
    path = write_atlas(tmp_path / "atlas.h5")
    with h5py.File(path, "r+") as file:
        layer = "layers/blocks.0.conv/effects"
        write_array(file, f"{layer}/attribution", np.zeros((20, IMAGES), np.float32))
        for name in ("mean", "size"):
            write_array(file, f"{layer}/{name}", np.zeros(20, np.float32))
        write_array(file, f"{layer}/ablation/channel", np.arange(0, 40, 2, dtype=np.int32))
        for replacement in ("zero", "mean"):
            write_array(file, f"{layer}/ablation/{replacement}/top", np.zeros((20, IMAGES), np.float32))
            effects = np.tile(np.arange(1, 21, dtype=np.float32)[:, None], len(LABELS))
            write_array(file, f"{layer}/ablation/{replacement}/mean", effects)
            write_array(file, f"{layer}/ablation/{replacement}/sd", np.ones_like(effects))
    for entry in entries_of(path).values():
        assert [unit[0] for unit in entry.effects[0][1]] == list(range(38, 38 - 2 * MOVING, -2))


def test_connections_are_those_of_the_store_between_listed_units(tmp_path: Path) -> None:
    path = write_atlas(tmp_path / "atlas.h5")
    with h5py.File(path, "r+") as file:
        write_known_effects(file)
        file["layers/stem/effects/ablation/channel"][...] = [0, 1, 5]
        for replacement in ("zero", "mean"):
            file[f"layers/stem/effects/ablation/{replacement}/sd"][...] = 0.1
    with open_atlas(path) as atlas:
        wiring = atlas["blocks.0.conv"].connectivity("inputs")
        assert wiring is not None and wiring.layer == "stem"
        readers = list(atlas["blocks.0.conv"].channels)
    entry = entries_of(path)["goldfish"]
    listed = sorted(unit[0] for order, units in entry.layers if order == 1 for unit in units)
    ((source, reader, found),) = [pair for pair in entry.connections if pair[:2] == (0, 1)] or [(0, 1, [])]
    # Every unit of the layer reads stem:5, strongest, and stem:0; the atlas has no third connection.
    expected = [[5, 105, c, 100 + readers.index(c), -1.5, 1.25] for c in listed]
    expected += [[0, 100, c, 100 + readers.index(c), 0.25, 0.75] for c in listed]
    assert listed and found == expected[:12] and (source, reader) == (0, 1)
    assert all(one[0] in entry.members()[0] and one[2] in entry.members()[1] for one in found)
