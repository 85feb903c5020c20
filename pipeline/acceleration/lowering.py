"""Make the network of the optimization steps from a folded one, for the device that it is on."""

from collections.abc import Collection, Sequence

import torch

from pipeline.acceleration import cpu_lowering
from pipeline.acceleration.batchnorm_folding import ConvNormPair
from pipeline.acceleration.gpu_lowering import fuse_rectifiers
from pipeline.models.loading import Model


def is_on_gpu(model: Model) -> bool:
    """Return whether a network is on a CUDA device."""
    return model.device.type == "cuda"


def lower(
    folded: Model,
    pairs: Sequence[ConvNormPair],
    dtype: torch.dtype = torch.float32,
    mixed: bool = False,
    visible: Collection[str] = (),
    fuse: bool = True,
) -> Model:
    """Return a copy of a folded network in `dtype` with faster convolutions, if the device has any.

    Args:
        folded: The network; it is not changed.
        pairs: See `cpu_lowering.lower`, as `dtype`, `mixed` and `visible`.
        dtype: Data type of weights and activations.
        mixed: Whether to run under autocast; on a GPU with the convolutions of PyTorch.
        visible: Paths of folded normalizations whose output is read.
        fuse: Whether convolutions apply rectifiers on a GPU, too.
    """
    model = cpu_lowering.lower(folded, pairs, dtype, mixed, visible)
    if fuse and not mixed and folded.channels_last and is_on_gpu(folded):
        return fuse_rectifiers(model, folded, pairs, visible)
    return model
