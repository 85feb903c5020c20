"""Fold each batch normalisation into the convolution before it: the same function, a third less time.

The folded normalisation stays in its place as an identity, so that layers tapped at its output, or at the
input of the activation fused with it, are tapped at the same path and see the same values.
"""

import collections
import copy
import dataclasses
import logging
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized

from pipeline.layers import Layer
from pipeline.models import Model
from pipeline.trace import CONVS, Trace, tensor_of

log = logging.getLogger(__name__)

Pair = tuple[str, str]


class FoldedNorm(nn.Module):
    """What is left of a folded normalisation: an identity, then what timm fuses with it, if anything.

    `drop` and `act` keep their names, where layers are tapped.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
        self.drop = drop if isinstance(drop, nn.Module) else nn.Identity()
        self.act = act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Activation of (B, C, H, W) maps that the convolution has already normalised."""
        return self.act(self.drop(x))


def pairs(trace: Trace) -> list[Pair]:
    """(convolution, normalisation) paths where the second follows directly, both are called once, and no
    other module reads the convolution's output."""
    found = []
    counts = collections.Counter(call.path for call in trace.calls)
    for call in trace.calls:
        module = trace.modules[call.path]
        readers = [c.path for c in trace.readers.get(call.output, ())]
        norms = [p for p in readers if isinstance(trace.modules[p], nn.modules.batchnorm._BatchNorm)]
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        if not isinstance(module, CONVS) or transposed or len(norms) != 1 or is_parametrized(module):
            continue
        norm = trace.modules[norms[0]]
        # A container may take the tensor as its input too, when the norm is its first child: that is no reader.
        inside = all(not p or norms[0] == p or norms[0].startswith(p + ".") for p in readers)
        if inside and counts[call.path] == counts[norms[0]] == 1 and norm.running_mean is not None:
            found.append((call.path, norms[0]))
    return found


def foldable(model: Model) -> tuple[Pair, ...]:
    """The pairs that can be folded without changing the network, checked against the original on noise.

    None of them where the outputs differ by more than rounding: a network that reads a convolution's output by
    other means than a module.
    """
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.module.modules()):
        return ()
    found = tuple(pairs(Trace(model)))
    folded = _folded(model, found)
    noise = torch.rand(1, model.recipe.channels, *model.recipe.size, generator=torch.Generator().manual_seed(0))
    noise = model.normalise(noise.to(next(model.module.parameters()).device))
    with torch.no_grad():
        before, after = tensor_of(model.module(noise)), tensor_of(folded.module(noise))
    if before is None or after is None or not torch.allclose(
        before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())
    ):  # fmt: skip
        log.info("normalisations of %s are not folded: its outputs would change", model.name)
        return ()
    log.debug("%d normalisations can be folded", len(found))
    return found


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
    # Tensors are shared, modules are copied.
    shared = {id(t): t for t in (*model.module.parameters(), *model.module.buffers())}
    module = copy.deepcopy(model.module, shared)
    for conv_path, norm_path in found:
        conv, norm = module.get_submodule(conv_path), module.get_submodule(norm_path)
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias  # type: ignore[arg-type]
        )  # fmt: skip
        conv.weight, conv.bias = weight.requires_grad_(False), bias.requires_grad_(False)
        parent, _, name = norm_path.rpartition(".")
        setattr(module.get_submodule(parent), name, FoldedNorm(norm).eval())
    return dataclasses.replace(model, module=module)
