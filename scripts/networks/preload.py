"""Prepare every process of the zoo: import all modules, and compile the C loops."""

import check
import timm
import torchvision

from pipeline.kernels import build

__all__ = ["check", "timm", "torchvision"]

for name, fused in (
    ("adam", False),
    ("spatial_stats", False),
    ("affine_sample", False),
    ("strided_conv_backward", True),
):
    build.load_library(name, fused=True) if fused else build.load_library(name)
