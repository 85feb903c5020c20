"""What every process of the zoo has when it begins: everything imported, and the loops in C compiled."""

import check
import timm
import torchvision

from pipeline.kernels import build

__all__ = ["check", "timm", "torchvision"]

for name, fused in (("optimizers", False), ("reduction", False), ("sampling", False), ("striding", True)):
    build.library(name, fused=True) if fused else build.library(name)
