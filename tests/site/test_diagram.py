"""The diagram of a network with residual connections and branches, in the built page."""

import itertools
import re

import h5py
import numpy as np
import pytest

from pipeline.site.layout import diagram
from pipeline.site.layout.branches import Flow, branches_of
from pipeline.store.hdf5 import write_array
from pipeline.store.reader import NetworkLayer
from tests.site.test_site import LAYERS, build, write_atlas

# conv 0; three branches (1; 2, 3; 4) that are concatenated; a residual block (5, 6) around the join; a last layer.
BRANCHED = Flow((-1, 0, 0, 2, 0, 8, 5, 9), ((1, 3, 4), (8, 6)))


def test_branches_are_lanes_and_residuals_are_skips():
    found = branches_of(BRANCHED, range(8))
    assert found.columns == (0, 1, 1, 2, 1, 3, 4, 5)
    assert found.lanes == (0, 0, 1, 1, 2, 0, 0, 0)
    assert set(found.ends) == {(1, 3), (4, 3)} and found.skips == ((3, 6),)
    assert found.wires == ((-1, 0), (0, 1), (0, 2), (2, 3), (0, 4), (3, 5), (5, 6), (6, 7))


def test_a_layer_may_be_numbered_before_what_it_reads():
    found = branches_of(Flow((1, -1, 0), ()), range(3))
    assert found.columns == (1, 0, 2) and found.wires == ((1, 0), (-1, 1), (0, 2))


def test_layers_that_are_not_drawn_pass_on_what_they_read():
    found = branches_of(BRANCHED, [0, 1, 3, 5, 7])
    # Without the last branch, which is a passage then, and without the block's own last layer.
    assert found.columns == (0, 1, 1, 2, 3) and found.lanes == (0, 0, 1, 0, 0)
    assert set(found.skips) == {(0, 1), (1, 3)}


def test_values_that_grow_by_concatenation_have_one_arc_each():
    """As in DenseNet: each layer reads all before it."""
    count = 12
    joins = tuple(tuple(range(i + 1)) for i in range(1, count))
    flow = Flow((-1, 0, *(count + i for i in range(count - 2))), joins)
    assert branches_of(flow, range(count)).skips == tuple((i, i + 1) for i in range(count - 2))


def test_parallel_boxes_do_not_overlap():
    network = [NetworkLayer(f"l{i}", "conv", 64, (28, 28), source) for i, source in enumerate(BRANCHED.sources)]
    layers = [diagram.DrawnLayer(one.name, one.kind, one.channels, one.map_size, None) for one in network]
    drawn = diagram.draw(layers, branches_of(BRANCHED, range(8)))
    assert drawn.lanes == 3 and len(drawn.arcs) == 1 and drawn.rows == 1
    for i, box in enumerate(drawn.boxes):
        for other in drawn.boxes[:i]:
            beside = box.x >= other.x + other.width or other.x >= box.x + box.width
            assert beside or box.y >= other.y + other.height or other.y >= box.y + box.height
    names = sorted((box.name_x, box.name_y) for box in drawn.boxes)
    assert all(b[0] - a[0] >= diagram.NAME_WIDTH - 0.1 for a, b in itertools.pairwise(names))
    # A single layer has its height, those in a branch a part of it.
    assert drawn.boxes[0].height > 2 * drawn.boxes[2].height


@pytest.mark.parametrize(("sources", "joins", "arcs", "lanes"), [
    ((-1, 0, 1, 4), ((0, 2),), 1, 1),  # a residual connection around the second and third layer
    ((-1, 0, 0, 4), ((1, 2),), 0, 2),  # two branches
    (None, None, 0, 1),  # an older atlas
])  # fmt: skip
def test_the_home_page_draws_what_the_atlas_has(tmp_path, sources, joins, arcs, lanes):
    path = write_atlas(tmp_path / "atlas.h5", layers=LAYERS[:1])
    rows = [("stem", "conv", 6, 16), ("b.0", "conv", 8, 8), ("b.1", "conv", 8, 8), ("b.2", "conv", 40, 8)]
    with h5py.File(path, "r+") as file:
        for at, key in enumerate(("name", "kind", "channels", "height")):
            array = np.array([row[at] for row in rows], object if at < 2 else np.int32)
            write_array(file, f"model/layers/{key}", array)
        write_array(file, "model/layers/width", np.array([row[3] for row in rows], np.int32))
        if sources is not None:
            write_array(file, "model/layers/source", np.array(sources, np.int32))
            pairs = [(join, node) for join, nodes in enumerate(joins) for node in nodes]
            write_array(file, "model/joins", np.array(pairs, np.int32))
    build(path)
    page = (tmp_path / "site/index.html").read_text()
    assert page.count('class="arc"') == arcs and ("Arcs are residual connections" in page) == bool(arcs)
    assert ("Parallel branches" in page) == (lanes > 1)
    if arcs:
        assert "<title>from stem past b.1</title>" in page
    boxes = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"', page.split('class="diagram"')[1].split("</svg>")[0])
    assert len(boxes) == 4 and len({x for x, _ in boxes}) == (3 if lanes > 1 else 4)
