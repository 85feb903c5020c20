"""Find which layer each layer reads, and where values of several layers come together.

The operations of one forward pass are observed below the modules (`TorchDispatchMode`). A tensor carries the number of
the layer that it was computed from last; an operation that reads tensors of several layers, such as the sum at the end
of a residual block or the concatenation of branches, makes a *join* of them.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.core.errors import first_line
from pipeline.kernels.device_errors import is_device_failure
from pipeline.layers.finding import Layer
from pipeline.layers.tracing import modules_of, run_on_noise, tensor_of, tensors_in
from pipeline.models.loading import Model

log = logging.getLogger(__name__)

# The source of a layer that reads no other layer.
IMAGE = -1


@dataclasses.dataclass(frozen=True)
class Dataflow:
    """What the layers of a network read, with all other operations left out.

    Nodes are numbered: the layers from 0 in their order, then the joins.

    Attributes:
        sources: Node that each layer reads; `IMAGE` for none.
        joins: Nodes that come together in each join, at least two.
    """

    sources: tuple[int, ...]
    joins: tuple[tuple[int, ...], ...]


def find_dataflow(model: Model, layers: Sequence[Layer]) -> Dataflow | None:
    """Return what the layers read, from one forward pass on noise; None if its operations cannot be observed.

    Args:
        model: The network.
        layers: The layers, in the order of computation.
    """
    modules = modules_of(model.module)
    observer = _Observer(len(layers))
    numbers: dict[tuple[str, str], dict[int, list[int]]] = {}
    for number, layer in enumerate(layers):
        numbers.setdefault((layer.module, layer.side), {}).setdefault(layer.call, []).append(number)
    handles = [
        observer.attach(modules[path], side, calls) for (path, side), calls in numbers.items() if path in modules
    ]
    try:
        with torch.no_grad(), observer:
            run_on_noise(model)
    except Exception as error:
        if is_device_failure(error):
            raise
        # As for rectifiers: what cannot be observed must not stop a run, whose network itself runs.
        log.info("%s: branches cannot be found, so its diagram has none: %s", model.name, first_line(error))
        return None
    finally:
        for handle in handles:
            handle.remove()
    return Dataflow(tuple(observer.sources), tuple(observer.joins))


class _Observer(TorchDispatchMode):
    """Follows the outputs of layers through the operations of a forward pass.

    Attributes:
        sources: See `Dataflow`.
        joins: See `Dataflow`.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.sources = [IMAGE] * layers
        self.joins: list[tuple[int, ...]] = []
        # Weak, because `id` is reused after a tensor is freed, and all tensors of a pass take too much memory.
        self._nodes = WeakTensorKeyDictionary()
        self._number_of_join: dict[frozenset[int], int] = {}

    def attach(self, module: nn.Module, side: str, layers: Mapping[int, Sequence[int]]) -> RemovableHandle:
        """Register the hook for the layers, by call, that are read at one side of a module."""
        calls = 0

        def reach(value: Any) -> None:
            nonlocal calls
            calls += 1
            tensor = tensor_of(value)
            if tensor is None:
                return
            for number in layers.get(calls, ()):
                node = self._nodes.get(tensor)
                self.sources[number] = IMAGE if node is None else node
                self._nodes[tensor] = number

        if side == "in":
            return module.register_forward_pre_hook(lambda _, args, kwargs: reach((args, kwargs)), with_kwargs=True)
        return module.register_forward_hook(lambda _, _args, output: reach(output))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation, and pass on the node that its inputs come from."""
        kwargs = dict(kwargs or {})
        inputs = [self._nodes[tensor] for tensor in tensors_in((args, kwargs)) if tensor in self._nodes]
        result = func(*args, **kwargs)
        if inputs:
            node = self._joined(list(dict.fromkeys(inputs)))
            for tensor in tensors_in(result):
                self._nodes[tensor] = node
        return result

    def _joined(self, nodes: list[int]) -> int:
        """Return the node of values that come from several ones."""
        if len(nodes) == 1:
            return nodes[0]
        key = frozenset(nodes)
        if key not in self._number_of_join:
            self._number_of_join[key] = len(self.sources) + len(self.joins)
            self.joins.append(tuple(nodes))
        return self._number_of_join[key]
