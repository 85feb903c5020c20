"""Columns and lanes of the layers in the diagram of the network: parallel branches beside each other, and skips."""

import dataclasses
from collections.abc import Sequence

IMAGE = -1


@dataclasses.dataclass(frozen=True)
class Flow:
    """What the layers of a network read.

    Attributes:
        sources: Node that each layer reads: the number of a layer, that of a join behind those of all layers, or
            `IMAGE` for none.
        joins: Nodes whose values come together in each join.
    """

    sources: tuple[int, ...]
    joins: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Branches:
    """Places of layers, by their number.

    Attributes:
        columns: Column of each layer: one more than that of the last layer that it depends on.
        lanes: Lane of each layer; 0 without parallel branches.
        last: For each layer, the last column of the parallel branches that it is a part of; its own column in lane 0.
        wires: Pairs of layers of which the second one reads the first one, or a join that ends with it; −1: the image.
        ends: Pairs of layers, the last ones of a branch and of the branch that it comes together with.
        skips: Pairs of layers: the value behind the first one passes by all layers up to the second one.
    """

    columns: tuple[int, ...]
    lanes: tuple[int, ...]
    last: tuple[int, ...]
    wires: tuple[tuple[int, int], ...]
    ends: tuple[tuple[int, int], ...]
    skips: tuple[tuple[int, int], ...]


def chain(count: int) -> Branches:
    """Return the places of layers of which nothing is known but their order."""
    order = tuple(range(count))
    return Branches(order, (0,) * count, order, tuple((i - 1, i) for i in order), (), ())


def branches_of(flow: Flow, drawn: Sequence[int]) -> Branches:
    """Return the places of the layers `drawn`, given by their numbers in `flow` in rising order."""
    graph = _Graph(flow, drawn)
    columns, lanes = [0] * len(drawn), [0] * len(drawn)
    lane_ends: dict[int, int] = {}  # last column of each lane
    for i in graph.order:
        members = graph.layers_in(graph.sources[i])
        column = 1 + max((columns[member] for member in members), default=-1)
        lane = min((lanes[member] for member in members), default=0)
        # The first reader of a value continues its lane, each further one begins a branch.
        while lane_ends.get(lane, -1) >= column:
            lane += 1
        lane_ends[lane] = column
        columns[i], lanes[i] = column, lane
    ends, skips = graph.joined(columns)
    last = list(columns)
    for i, other in ends:
        last[i] = max(last[i], columns[other])
    wires = tuple((graph.end_of(source, columns), i) for i, source in enumerate(graph.sources))
    return Branches(tuple(columns), tuple(lanes), tuple(last), wires, ends, skips)


class _Graph:
    """The layers that are drawn and the joins between them; layers are numbered among those drawn.

    Attributes:
        sources: Node that each layer reads: a layer, −2 − the number of a join, or `IMAGE`.
        order: The layers, each behind those that it depends on; otherwise in their own order.
    """

    def __init__(self, flow: Flow, drawn: Sequence[int]) -> None:
        self._flow = flow
        self._place = {number: i for i, number in enumerate(drawn)}
        self._known: dict[int, int] = {}
        self._joins: list[tuple[int, ...]] = []
        self._contents: list[frozenset[int]] = []  # layers whose values each join contains
        self.sources = [self._node(flow.sources[number]) for number in drawn]
        self.order = self._sorted()
        self._before: dict[int, frozenset[int]] = {}
        for i in self.order:
            members = self.layers_in(self.sources[i])
            self._before[i] = members.union(*(self._before[member] for member in members))

    def _sorted(self) -> list[int]:
        # A layer may be numbered before one that it reads, such as a convolution that is read behind its normalization.
        done: dict[int, None] = {}
        pending = list(reversed(range(len(self.sources))))
        while pending:
            i = pending[-1]
            missing = [member for member in sorted(self.layers_in(self.sources[i])) if member not in done]
            if missing and i not in done:
                pending += reversed(missing)
            else:
                done[pending.pop()] = None
        return list(done)

    def _node(self, number: int) -> int:
        """Return the node of a node of the whole network: layers that are not drawn pass on what they read."""
        layers = len(self._flow.sources)
        while 0 <= number < layers and number not in self._place:
            number = self._flow.sources[number]
        if number < layers:
            return self._place.get(number, IMAGE)
        if number not in self._known:
            nodes = dict.fromkeys(map(self._node, self._flow.joins[number - layers]))
            self._known[number] = self._join(tuple(node for node in nodes if node != IMAGE))
        return self._known[number]

    def _join(self, nodes: tuple[int, ...]) -> int:
        if len(nodes) < 2:
            return nodes[0] if nodes else IMAGE
        # Of values that grow by concatenation, only the new ones come together with the former join.
        contents = frozenset().union(*map(self.layers_in, nodes))
        contained = [n for n, former in enumerate(self._contents) if former < contents and -2 - n not in nodes]
        if contained and not any(node < IMAGE for node in nodes):
            largest = max(contained, key=lambda n: len(self._contents[n]))
            nodes = (-2 - largest, *(node for node in nodes if node not in self._contents[largest]))
        if nodes not in self._joins:
            self._joins.append(nodes)
            self._contents.append(contents)
        return -2 - self._joins.index(nodes)

    def layers_in(self, node: int) -> frozenset[int]:
        """Return the layers whose values a node contains."""
        if node >= 0:
            return frozenset([node])
        return frozenset() if node == IMAGE else self._contents[-2 - node]

    def end_of(self, node: int, columns: Sequence[int]) -> int:
        """Return the layer of a node in the last column, of several the first one; `IMAGE` for none."""
        return max(sorted(self.layers_in(node)), key=columns.__getitem__, default=IMAGE)

    def joined(self, columns: Sequence[int]) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
        """Return the ends of parallel branches and the skips; see `Branches`."""
        ends: dict[tuple[int, int], None] = {}
        skips: dict[tuple[int, int], None] = {}
        for number, nodes in enumerate(self._joins):
            last = self.end_of(-2 - number, columns)
            for node in nodes:
                end = self.end_of(node, columns)
                if end != last:
                    is_before = self.layers_in(node) <= self._before[last]
                    (skips if is_before else ends)[end, last] = None
        return tuple(ends), tuple(skips)
