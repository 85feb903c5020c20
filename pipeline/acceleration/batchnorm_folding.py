"""Fold batch normalizations into the convolutions before them: the same function in a third less time.

A folded normalization is replaced by an identity at the same path, so that layers read at its output, or at the input
of the activation fused with it, are read at the same path and have the same values.
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
from pipeline.kernels.device_errors import is_device_failure
from pipeline.layers.finding import Layer
from pipeline.layers.tracing import Trace, modules_of, tensor_of, trace_of
from pipeline.models.loading import Model

log = logging.getLogger(__name__)

# Paths of a convolution and of the batch normalization after it.
ConvNormPair = tuple[str, str]

# Forward methods that compute a convolution only, or a batch normalization with the dropout and activation that timm
# fuses with it. A subclass with another forward method may change its weights, for example standardize them.
CONV_FORWARDS = frozenset({nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, Conv2dSame.forward})
NORM_FORWARDS = frozenset({nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNormAct2d.forward})


def only_argument(args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> Tensor:
    """Return the only argument of a call, whether it was passed by position or by keyword."""
    (x,) = (*args, *kwargs.values())
    return x


def plain_forward(module: nn.Module) -> bool:
    """Return whether a module computes the forward method of its class with its own parameters.

    This is not so with hooks, which may change its input, its output or its weights (pruning, the deprecated
    `weight_norm` and `spectral_norm`), with parametrizations, and if `forward` is set on the instance.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks
    # Parametrizations remove the weight from the parameters of the module.
    return not hooks and "forward" not in vars(module) and "weight" in module._parameters


def copy_network(module: nn.Module, convert: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> nn.Module:
    """Copy all modules of a network, but share their tensors.

    Tensors are parameters, buffers and plain attributes (a table cached by the first forward pass, the weight that a
    hook computes). `copy.deepcopy` alone fails for tensors that were computed with gradients.

    Args:
        module: The network.
        convert: Called for each tensor; the copy contains the result in its place.
    """
    memo: dict[int, Any] = {}
    for child in module.modules():
        for value in (*child._parameters.values(), *child._buffers.values(), *vars(child).values()):
            if isinstance(value, Tensor):
                memo[id(value)] = convert(value if value.is_leaf else value.detach())
    return copy.deepcopy(module, memo)


class FoldedNorm(nn.Module):
    """The replacement of a folded normalization: an identity, and the modules that timm fuses with it.

    Attributes:
        drop: The dropout of a timm layer, or an identity.
        act: The activation of a timm layer, or an identity. Both have the names of timm, because layers are read here.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
        self.drop = drop if isinstance(drop, nn.Module) else nn.Identity()
        self.act = act if isinstance(act, nn.Module) else nn.Identity()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Apply dropout and activation to maps (B, C, H, W) that the convolution has normalized."""
        return self.act(self.drop(only_argument(args, kwargs)))


def conv_norm_pairs(trace: Trace) -> list[ConvNormPair]:
    """Return the pairs of a convolution and a batch normalization that can be folded according to a trace.

    Both are called once, and no other module reads the output of the convolution.
    """
    pairs = []
    num_calls = collections.Counter(call.path for call in trace.calls)
    for call in trace.calls:
        module = trace.modules[call.path]
        if type(module).forward not in CONV_FORWARDS or not plain_forward(module):
            continue
        readers = [reader.path for reader in trace.readers.get(call.output, ())]
        norms = [path for path in readers if type(trace.modules[path]).forward in NORM_FORWARDS]
        if len(norms) != 1:
            continue
        norm = trace.modules[norms[0]]
        # Containers receive the same tensor if the normalization is their first child; they do not count as readers.
        is_only_reader = all(not path or norms[0] == path or norms[0].startswith(path + ".") for path in readers)
        called_once = num_calls[call.path] == num_calls[norms[0]] == 1
        if is_only_reader and called_once and norm.running_mean is not None and plain_forward(norm):
            pairs.append((call.path, norms[0]))
    return pairs


def foldable_pairs(model: Model) -> tuple[ConvNormPair, ...]:
    """Return the pairs that can be folded without changing the network.

    The folded network is compared with the original on noise. No pair is returned if a normalization or the output
    differs by more than rounding (the network reads the output of a convolution without a module), or if the network
    can't be copied.
    """
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.module.modules()):
        return ()
    pairs = tuple(conv_norm_pairs(trace_of(model)))
    if not pairs:
        return ()
    norms = [norm for _, norm in pairs]
    try:
        folded = _folded(model, pairs)
        expected, outputs = _outputs(model, norms), _outputs(folded, norms)
    except Exception as error:
        if is_device_failure(error):
            raise
        # Attributes of a network may be impossible to copy, and raise any error.
        log.info("%s: batch normalizations are not folded: %s: %s", model.name, type(error).__name__, first_line(error))
        return ()
    for path, output in expected.items():
        # Rounding may change the number of boxes of a detector; the outputs that they depend on are compared before.
        is_comparable = path in outputs and outputs[path].shape == output.shape
        if is_comparable and not _is_close(outputs[path], output):
            log.info("%s: batch normalizations are not folded: %s would change", model.name, path or "the output")
            return ()
    log.debug("%d normalizations can be folded", len(pairs))
    return pairs


def _is_close(output: Tensor, expected: Tensor) -> bool:
    """Return whether two outputs are equal to rounding, by the norm of their difference over finite values."""
    difference, scale = torch.nan_to_num(output - expected, 0, 0, 0).norm(), torch.nan_to_num(expected, 0, 0, 0).norm()
    return float(difference) <= 1e-3 * float(scale) + 1e-12


def _outputs(model: Model, paths: Sequence[str]) -> dict[str, Tensor]:
    """Return the outputs of the modules at `paths` and of the whole network ("") for an image of noise."""
    outputs: dict[str, Tensor] = {}

    def store(path: str, output: Any) -> None:
        tensor = tensor_of(output)
        if tensor is not None and tensor.is_floating_point():
            outputs[path] = tensor.clone()

    modules = modules_of(model.module)
    handles = [
        modules[path].register_forward_hook(lambda _, __, output, path=path: store(path, output))
        for path in (*paths, "")
    ]
    noise = torch.rand(
        1, model.preprocessing.channels, *model.preprocessing.size, generator=torch.Generator().manual_seed(0)
    )
    try:
        with torch.no_grad():
            model.module(model.normalize(noise.to(model.device)))
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def fold(model: Model, pairs: Sequence[ConvNormPair] | None = None, targets: Sequence[Layer] = ()) -> Model:
    """Fold batch normalizations.

    Args:
        model: The network; it is not changed.
        pairs: The pairs that `foldable_pairs` returned; None to compute them.
        targets: Layers that will be read. A pair with one of these layers at or inside one of its modules is not
            folded.

    Returns:
        A copy that shares all other weights with `model`; `model` itself if there is nothing to fold.
    """
    pairs = foldable_pairs(model) if pairs is None else pairs
    target_paths = {path for layer in targets for path in (layer.name.partition("#")[0], layer.module)}

    def is_read(pair: ConvNormPair) -> bool:
        return any(path == member or path.startswith(f"{member}.") for member in pair for path in target_paths)

    unread = [pair for pair in pairs if not is_read(pair)]
    return _folded(model, unread) if unread else model


def _folded(model: Model, pairs: Sequence[ConvNormPair]) -> Model:
    """Return a copy of a network in which `pairs` are folded."""
    module = copy_network(model.module)
    for conv_path, norm_path in pairs:
        conv, norm = module.get_submodule(conv_path), module.get_submodule(norm_path)
        assert isinstance(conv, nn.modules.conv._ConvNd) and isinstance(norm, nn.modules.batchnorm._BatchNorm)
        assert norm.running_mean is not None and norm.running_var is not None
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.requires_grad_(False)
        parent, _, name = norm_path.rpartition(".")
        setattr(module.get_submodule(parent), name, FoldedNorm(norm).eval())
    return dataclasses.replace(model, module=module)
