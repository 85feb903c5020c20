"""Replace the convolutions of a folded network by ones that apply ReLU themselves, for a GPU.

After batch normalizations are folded, a network consists of convolutions, sums and rectifiers, and on a GPU each bias,
sum and rectifier reads and writes whole maps. `fused_convolutions` writes them once.

A convolution is replaced if a ReLU module is all that reads its normalized output. This is read off the graph that
autograd records, so that a sum or a function that reads the output as well is not overlooked. The sum at the end of a
residual block becomes a part of the convolution before it in the ResNet blocks of torchvision and timm, whose forward
methods are known. Other networks keep their sums.
"""

import collections
import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from timm.models import resnet as timm_resnet
from torch import Tensor, nn
from torchvision.models import resnet

from pipeline.acceleration.batchnorm_folding import ConvNormPair, FoldedNorm, copy_network
from pipeline.acceleration.fused_convolutions import FusedConv2d, JoiningConv2d, SkippingReLU, is_fusible
from pipeline.core.errors import first_line
from pipeline.layers.tracing import tensors_in
from pipeline.models.loading import Model

log = logging.getLogger(__name__)

# A node of the graph that autograd records.
Node = torch.autograd.graph.Node


def fuse_rectifiers(model: Model, folded: Model, pairs: Sequence[ConvNormPair], visible: Collection[str] = ()) -> Model:
    """Return a copy of a network whose convolutions apply ReLU themselves where possible.

    Args:
        model: The network, or a copy of it in another data type; it is not changed.
        folded: The network in float32, on the same device.
        pairs: The result of `foldable_pairs`.
        visible: Paths of folded normalizations whose output is read: a rectifier after them stays a module.

    Returns:
        The copy shares its tensors with `model`. It is `model` itself if there is nothing to replace.
    """
    modules = dict(folded.module.named_modules())
    candidates = {
        conv for conv, norm in pairs if norm not in visible and _passes(modules[norm]) and is_fusible(modules[conv])
    }
    joined = {path: last for path, last in _residual_blocks(modules, dict(pairs)).items() if last in candidates}
    try:
        rectified = _rectified_convolutions(folded, candidates)
    except Exception as error:
        # The network is run in a way that it was not written for, and may raise any error.
        log.debug("%s: no rectifiers are fused: %s: %s", folded.name, type(error).__name__, first_line(error))
        return model
    if not rectified and not joined:
        return model
    module = copy_network(model.module)
    for path in rectified:
        _replace(module, path, FusedConv2d)
    for path, last in joined.items():
        _replace(module, last, JoiningConv2d)
        block = module.get_submodule(path)
        block.__class__ = JOINED[type(block)]
    _replace_rectifiers(module)
    return dataclasses.replace(model, module=module)


def _passes(norm: nn.Module) -> bool:
    """Return whether a module is a folded normalization that passes its input on to its activation, unchanged."""
    return isinstance(norm, FoldedNorm) and isinstance(norm.drop, nn.Identity)


def _replace(module: nn.Module, path: str, replacement: type[FusedConv2d]) -> None:
    """Replace a convolution of `module` in place."""
    parent, _, name = path.rpartition(".")
    conv = module.get_submodule(path)
    assert isinstance(conv, nn.Conv2d)
    setattr(module.get_submodule(parent), name, replacement(conv).eval())


def _replace_rectifiers(module: nn.Module) -> None:
    """Replace the ReLU modules of `module` in place. One that is used at several places stays one module."""
    replaced: dict[nn.Module, SkippingReLU] = {}
    for path, child in list(module.named_modules(remove_duplicate=False)):
        if path and _is_plain_relu(child):
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, replaced.setdefault(child, SkippingReLU().eval()))


def _is_plain_relu(module: nn.Module) -> bool:
    """Return whether a module computes ReLU and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module) is nn.ReLU and not hooks and "forward" not in vars(module)


def _rectified_convolutions(folded: Model, candidates: Collection[str]) -> set[str]:
    """Return the convolutions whose output is read by one ReLU module and by nothing else."""
    made: dict[Node, str] = {}
    read: set[Node] = set()

    def remember(path: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            made[output.grad_fn] = path

    def read_by_relu(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].grad_fn is not None:
            read.add(args[0].grad_fn)

    modules = dict(folded.module.named_modules())
    handles = [
        modules[path].register_forward_hook(lambda _, __, output, path=path: remember(path, output))
        for path in candidates
    ]
    handles += [m.register_forward_pre_hook(read_by_relu) for m in modules.values() if _is_plain_relu(m)]
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, folded.preprocessing.channels, *folded.preprocessing.size, generator=generator)
    try:
        images = noise.to(folded.device).requires_grad_(True)
        with torch.enable_grad():
            outputs = folded.module(folded.normalize(images))
    finally:
        for handle in handles:
            handle.remove()
    num_readers = _num_readers([tensor.grad_fn for tensor in tensors_in(outputs)])
    return {path for node, path in made.items() if node in read and num_readers[node] == 1}


def _num_readers(outputs: Sequence[Node | None]) -> collections.Counter[Node]:
    """Return how often the result of each node is read by the other nodes, or is an output of the network."""
    num_readers = collections.Counter(node for node in outputs if node is not None)
    waiting = list(num_readers)
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                num_readers[node] += 1
                if num_readers[node] == 1:
                    waiting.append(node)
    return num_readers


def _residual_blocks(modules: Mapping[str, nn.Module], norms: Mapping[str, str]) -> dict[str, str]:
    """Return the residual blocks that a class of `JOINED` can replace, with the path of their last convolution."""
    blocks: dict[str, str] = {}
    for path, block in modules.items():
        if type(block) not in JOINED or "forward" in vars(block):
            continue
        is_basic = isinstance(block, (resnet.BasicBlock, timm_resnet.BasicBlock))
        number = 2 if is_basic else 3
        relu = getattr(block, "relu", None) or getattr(block, f"act{number}")
        between = [getattr(block, name, None) for name in ("se", "drop_path")]
        if not _is_plain_relu(relu) or any(m is not None and not isinstance(m, nn.Identity) for m in between):
            continue
        prefix = f"{path}." if path else ""
        conv, norm = f"{prefix}conv{number}", f"{prefix}bn{number}"
        # A normalization with an activation of its own would apply it before the sum.
        if norms.get(conv) == norm and isinstance(getattr(modules[norm], "act", None), nn.Identity):
            blocks[path] = conv
    return blocks


def _through(module: nn.Module | None, x: Tensor) -> Tensor:
    """Return module(x), or `x` if there is no module."""
    return x if module is None else module(x)


def _join(conv: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """Return relu(conv(x) + residual)."""
    assert isinstance(conv, JoiningConv2d)
    return conv.join(x, residual)


class JoinedBasicBlock(resnet.BasicBlock):
    """The block of torchvision with the sum inside its last convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(_join(self.conv2, out, _through(self.downsample, x)))


class JoinedBottleneck(resnet.Bottleneck):
    """The block of torchvision with the sum inside its last convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(_join(self.conv3, out, _through(self.downsample, x)))


class JoinedTimmBasicBlock(timm_resnet.BasicBlock):
    """The block of timm with the sum inside its last convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        out = _through(self.aa, self.act1(self.drop_block(self.bn1(self.conv1(x)))))
        return self.act2(_join(self.conv2, out, _through(self.downsample, x)))


class JoinedTimmBottleneck(timm_resnet.Bottleneck):
    """The block of timm with the sum inside its last convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        out = self.act1(self.bn1(self.conv1(x)))
        out = _through(self.aa, self.act2(self.drop_block(self.bn2(self.conv2(out)))))
        return self.act3(_join(self.conv3, out, _through(self.downsample, x)))


# What replaces the residual blocks of these classes; not of their subclasses, which may compute something else.
JOINED: dict[type[nn.Module], type[nn.Module]] = {
    resnet.BasicBlock: JoinedBasicBlock,
    resnet.Bottleneck: JoinedBottleneck,
    timm_resnet.BasicBlock: JoinedTimmBasicBlock,
    timm_resnet.Bottleneck: JoinedTimmBottleneck,
}
