"""Remove the modules that training wraps around a network: compiled, data-parallel and averaged models."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def unwrapped(module: nn.Module) -> nn.Module:
    """Remove the wrappers of training around a network and around its parts.

    Compiled networks (`torch.compile`, `Module.compile`), `DataParallel`, `DistributedDataParallel` and `AveragedModel`
    compute the same as the wrapped module, but prefix its parameter names with `_orig_mod.` or `module.`.

    Args:
        module: The network. It is changed in place and runs uncompiled afterwards.

    Returns:
        The network inside all wrappers.
    """
    while (inner := _inner(module)) is not None:
        module = inner
    for child in module.modules():
        child._compiled_call_impl = None
        for name, part in list(child._modules.items()):
            if part is not None and _inner(part) is not None:
                child._modules[name] = unwrapped(part)
    return module


def _inner(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper, or None if `module` is no wrapper."""
    if isinstance(module, torch._dynamo.OptimizedModule):
        return module._orig_mod
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    return module.module if isinstance(module, wrappers) else None
