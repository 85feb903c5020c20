"""Networks inside the modules that training puts around them: compiled, data-parallel and averaged ones."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def unwrapped(module: nn.Module) -> nn.Module:
    """Return a network without the modules that training put around it or around its parts.

    Compiled networks (`torch.compile`, `Module.compile`), `DataParallel`, `DistributedDataParallel` and averaged models
    compute what the module inside them does, under names that begin with `_orig_mod.` or `module.`. The network is
    changed in place; it runs uncompiled afterwards.
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
    """The module that a wrapper holds; None for a module that is no wrapper."""
    if isinstance(module, torch._dynamo.OptimizedModule):
        return module._orig_mod
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
    return module.module if isinstance(module, wrappers) else None
