"""Fold each batch normalisation into the convolution before it: the same function, a third less time.

The folded normalisation stays in its place as an identity, so that layers tapped at its output, or at the
input of the activation fused with it, are tapped at the same path and see the same values.
"""

import collections
import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pipeline.core.errors import first_line
from pipeline.layers.finding import Layer
from pipeline.layers.tracing import Trace, modules_of, tensor_of, trace_of
from pipeline.models.loading import Model

log = logging.getLogger(__name__)

Pair = tuple[str, str]

# Forward methods that compute nothing but a convolution, or a batch normalization and what timm fuses with it. A
# subclass with a forward of its own may do anything with its weights, such as standardizing them at every call.
CONV_FORWARDS = frozenset({nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, Conv2dSame.forward})
NORM_FORWARDS = frozenset({nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNormAct2d.forward})


def only_argument(args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> Tensor:
    """Return the one tensor that a module was called with, by position or by keyword."""
    (x,) = (*args, *kwargs.values())
    return x


def plain_forward(module: nn.Module) -> bool:
    """Whether a module computes what its class says, from the parameters that it holds.

    False with hooks, which may change its input or output or recompute its weights before every call (pruning, the
    former `weight_norm` and `spectral_norm`), with parametrizations, and with a `forward` set on the instance.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks
    # What recomputes the weights takes them out of the module's own parameters.
    return not hooks and "forward" not in vars(module) and "weight" in module._parameters


def copy_network(module: nn.Module, convert: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> nn.Module:
    """Return a copy of all modules, in which every tensor is what `convert` returns for it, by default the same one.

    This covers parameters, buffers and tensors kept as plain attributes (a table cached by the first forward pass, the
    weight that a hook recomputes), which `copy.deepcopy` refuses if they were computed with gradients.
    """
    memo: dict[int, Any] = {}
    for child in module.modules():
        for value in (*child._parameters.values(), *child._buffers.values(), *vars(child).values()):
            if isinstance(value, Tensor):
                memo[id(value)] = convert(value if value.is_leaf else value.detach())
    return copy.deepcopy(module, memo)


class FoldedNorm(nn.Module):
    """What is left of a folded normalisation: an identity, then what timm fuses with it, if anything.

    `drop` and `act` keep their names, where layers are tapped.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
        self.drop = drop if isinstance(drop, nn.Module) else nn.Identity()
        self.act = act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Activation of (B, C, H, W) maps that the convolution has already normalised."""
        return self.act(self.drop(only_argument(args, kwargs)))


def pairs(trace: Trace) -> list[Pair]:
    """(convolution, normalisation) paths where the second follows directly, both are called once, and no
    other module reads the convolution's output."""
    found = []
    counts = collections.Counter(call.path for call in trace.calls)
    for call in trace.calls:
        module = trace.modules[call.path]
        if type(module).forward not in CONV_FORWARDS or not plain_forward(module):
            continue
        readers = [c.path for c in trace.readers.get(call.output, ())]
        norms = [p for p in readers if type(trace.modules[p]).forward in NORM_FORWARDS]
        if len(norms) != 1:
            continue
        norm = trace.modules[norms[0]]
        # A container may take the tensor as its input too, when the norm is its first child: that is no reader.
        inside = all(not p or norms[0] == p or norms[0].startswith(p + ".") for p in readers)
        once = counts[call.path] == counts[norms[0]] == 1
        if inside and once and norm.running_mean is not None and plain_forward(norm):
            found.append((call.path, norms[0]))
    return found


def foldable(model: Model) -> tuple[Pair, ...]:
    """The pairs that can be folded without changing the network, checked against the original on noise.

    None of them where a normalization or the output of the network differs by more than rounding: a network that
    reads a convolution's output by other means than a module. None either where the network can't be copied.
    """
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.module.modules()):
        return ()
    found = tuple(pairs(trace_of(model)))
    if not found:
        return ()
    try:
        folded = _folded(model, found)
        before, after = (_outputs(network, [norm for _, norm in found]) for network in (model, folded))
    except Exception as error:
        # A network may hold what can't be copied, and raise anything at all.
        log.info("%s: batch normalizations are not folded: %s: %s", model.name, type(error).__name__, first_line(error))
        return ()
    for path, wanted in before.items():
        # The number of boxes that a detector finds may change by rounding; what it finds them by was compared already.
        if path in after and after[path].shape == wanted.shape and not _close(after[path], wanted):
            log.info("%s: batch normalizations are not folded: %s would change", model.name, path or "the output")
            return ()
    log.debug("%d normalisations can be folded", len(found))
    return found


def _close(after: Tensor, before: Tensor) -> bool:
    """Whether two outputs are equal to rounding, by the norm of their difference over finite values."""
    difference, size = torch.nan_to_num(after - before, 0, 0, 0).norm(), torch.nan_to_num(before, 0, 0, 0).norm()
    return float(difference) <= 1e-3 * float(size) + 1e-12


def _outputs(model: Model, paths: Sequence[str]) -> dict[str, Tensor]:
    """Outputs of the modules at `paths` and of the whole network ("") on an image of noise."""
    outputs: dict[str, Tensor] = {}

    def keep(path: str, output: Any) -> None:
        tensor = tensor_of(output)
        if tensor is not None and tensor.is_floating_point():
            outputs[path] = tensor.clone()

    modules = modules_of(model.module)
    handles = [modules[p].register_forward_hook(lambda _, __, o, p=p: keep(p, o)) for p in (*paths, "")]
    noise = torch.rand(1, model.recipe.channels, *model.recipe.size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            model.module(model.normalise(noise.to(next(model.module.parameters()).device)))
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def fold(model: Model, found: Sequence[Pair] | None = None, targets: Sequence[Layer] = ()) -> Model:
    """A twin of `model` with its foldable pairs (`found`, if known) folded, all but those that `targets` look at.

    The twin shares all other weights with the original, which stays as it is.
    """
    found = foldable(model) if found is None else found
    looked_at = {path for layer in targets for path in (layer.name.partition("#")[0], layer.module)}

    def spared(pair: Pair) -> bool:
        return any(path == own or path.startswith(f"{own}.") for own in pair for path in looked_at)

    kept = [pair for pair in found if not spared(pair)]
    return _folded(model, kept) if kept else model


def _folded(model: Model, found: Sequence[Pair]) -> Model:
    module = copy_network(model.module)
    for conv_path, norm_path in found:
        conv, norm = module.get_submodule(conv_path), module.get_submodule(norm_path)
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias  # type: ignore[arg-type]
        )  # fmt: skip
        conv.weight, conv.bias = weight.requires_grad_(False), bias.requires_grad_(False)
        parent, _, name = norm_path.rpartition(".")
        setattr(module.get_submodule(parent), name, FoldedNorm(norm).eval())
    return dataclasses.replace(model, module=module)
