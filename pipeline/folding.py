"""Fold each batch normalisation into the convolution before it: the same function, a third less time.

The folded normalisation stays in its place as an identity, so that layers tapped at its output, or at the
input of the activation fused with it, are tapped at the same path and see the same values.
"""

import copy
import logging

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pipeline.layers import CONVS, Trace
from pipeline.models import Model

log = logging.getLogger(__name__)


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


def pairs(trace: Trace) -> list[tuple[str, str]]:
    """(convolution, normalisation) paths where the second follows directly, both are called once, and no
    other module reads the convolution's output."""
    found = []
    calls = [c.path for c in trace.calls]
    for call in trace.calls:
        module = trace.modules[call.path]
        readers = [c.path for c in trace.calls if call.output in c.inputs]
        norms = [p for p in readers if isinstance(trace.modules[p], nn.modules.batchnorm._BatchNorm)]
        if not isinstance(module, CONVS) or isinstance(module, nn.ConvTranspose2d) or len(norms) != 1:
            continue
        norm = trace.modules[norms[0]]
        # A container may take the tensor as its input too, when the norm is its first child: that is no reader.
        inside = all(norms[0] == p or norms[0].startswith(p + ".") for p in readers)
        if inside and calls.count(call.path) == calls.count(norms[0]) == 1 and norm.running_mean is not None:
            found.append((call.path, norms[0]))
    return found


def fold(model: Model) -> Model:
    """A copy of `model` with every foldable pair folded, checked against the original on noise.

    Where the outputs differ by more than rounding (a network that reads a convolution's output by other
    means than a module), the original is returned.
    """
    trace = Trace(model)
    module = copy.deepcopy(model.module)
    found = pairs(trace)
    for conv_path, norm_path in found:
        conv, norm = module.get_submodule(conv_path), module.get_submodule(norm_path)
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias  # type: ignore[arg-type]
        )  # fmt: skip
        conv.weight, conv.bias = weight.requires_grad_(False), bias.requires_grad_(False)
        parent, _, name = norm_path.rpartition(".")
        setattr(module.get_submodule(parent), name, FoldedNorm(norm))
    noise = torch.rand(2, model.recipe.channels, *model.recipe.size, generator=torch.Generator().manual_seed(0))
    noise = model.normalise(noise.to(next(module.parameters()).device))
    with torch.no_grad():
        before, after = model.module(noise), module(noise)
    if isinstance(before, torch.Tensor) and torch.allclose(
        before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())
    ):
        log.debug("folded %d normalisations", len(found))
        return Model(module, model.name, model.recipe, model.digest, model.labels)
    log.info("normalisations of %s are not folded: its outputs would change", model.name)
    return model
