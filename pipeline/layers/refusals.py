"""Error messages for networks that reject their input, with advice that is tried on the network before it is given."""

import inspect
import re
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.core.errors import AtlasError, first_line
from pipeline.models.loading import Model

# Input sizes (pixels) that are tried if a network rejects the configured one.
SIDES = (224, 32, 28, 64, 96, 128, 160, 192, 227, 240, 256, 288, 299, 320, 336, 384, 448, 512)
# No further size is tried after this many seconds.
MAX_SECONDS = 10.0

DTYPE_ERROR = re.compile(r"dtype|scalar type|should be the same|Half|Double|BFloat16|ComplexFloat", re.I)
CHANNELS_ERROR = re.compile(r"to have (\d+) channels, but got (\d+) channels")


class NotTaken(AtlasError):
    """Raised when the forward pass of a network raises an error.

    Args:
        model: The network.
        images: Its input before normalization, (B, C, H, W) in [0, 1].
        cause: The error that the forward pass raised.
    """

    def __init__(self, model: Model, images: Tensor, cause: Exception) -> None:
        self.model, self.images, self.cause = model, images, cause
        shape = " × ".join(map(str, images.shape))
        super().__init__(
            f"{model.name} does not take {shape} (images × channels × height × width): "
            f"{type(cause).__name__}: {first_line(cause)}"
        )

    def explained(self) -> AtlasError:
        """Return the error with the path of the failing module, and with advice if there is any."""
        path, module = _failing_module(self.model, self.images)
        place = f" (raised in {path}, a {type(module).__name__})" if path else ""
        advice = _advice(self.model, self.images, self.cause, module)
        return AtlasError(f"{self}{place}" + (f"\n{advice}" if advice else ""))


def _failing_module(model: Model, images: Tensor) -> tuple[str, nn.Module]:
    """Return path and module of the innermost call that raises for `images`; the network itself if none does."""
    running: list[str] = []
    handles = []
    for path, module in model.module.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        handles.append(module.register_forward_pre_hook(lambda _, __, path=path: running.append(path)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        _run(model, images)
    except Exception:
        path = running[-1] if running else ""
        return path, model.module.get_submodule(path)
    finally:
        for handle in handles:
            handle.remove()
    return "", model.module


def _run(model: Model, images: Tensor) -> None:
    """Run the network on images in [0, 1]."""
    with torch.no_grad():
        model.module(model.normalize(images.to(model.device)))


def _advice(model: Model, images: Tensor, cause: Exception, module: nn.Module) -> str:
    """Return what the user can do about an error `cause` raised by `module`; empty if nothing is known to help."""
    extra_inputs = required_inputs(model.module)
    if extra_inputs:
        arguments = ", ".join(f"{name}=…" for name in extra_inputs)
        return (
            f"Its forward needs {', '.join(extra_inputs)} beside the images. Write a builder (model.target) that "
            "returns a module with one input, which passes fixed values for the other inputs:\n"
            "  class OneInput(nn.Module):\n"
            "      def __init__(self, net): super().__init__(); self.net = net\n"
            f"      def forward(self, images): return self.net(images, {arguments})"
        )
    text = str(cause)
    if isinstance(module, nn.Conv1d):
        return (
            "It takes sequences (batch × channels × length) and is not a network of images. Write a builder "
            "(model.target) that returns a module which converts an image to a sequence, e.g. images.flatten(2)."
        )
    if isinstance(module, nn.Conv3d):
        return (
            "It takes clips (batch × channels × frames × height × width). Write a builder (model.target) that returns "
            "a module which repeats the image: self.net(images[:, :, None].expand(-1, -1, 8, -1, -1))."
        )
    if DTYPE_ERROR.search(text):
        return (
            "Its weights are float32 here, and its forward converts to another type (.half(), .double(), …). Convert "
            "to the type of the weights instead: images.to(self.conv.weight.dtype)."
        )
    return next(_working_settings(model, images, text), "")


def required_inputs(module: nn.Module) -> list[str]:
    """Return the names of the inputs of a module's forward that have no default, without the first one."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return []
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in named[1:] if p.default is p.empty]


def _working_settings(model: Model, images: Tensor, text: str) -> Iterator[str]:
    """Yield settings with which the network runs; each was tried. `text` is the error message for `images`."""
    start = time.monotonic()
    channels = images.shape[1]
    match = CHANNELS_ERROR.search(text)
    if match and int(match[2]) == channels:
        channels = int(match[1])
    channels_setting = f"model.channels={channels}" if channels != images.shape[1] else ""
    configured = (images.shape[2], images.shape[3])
    for size in (configured, *((side, side) for side in SIDES)):
        if time.monotonic() - start > MAX_SECONDS:
            return
        if size == configured and not channels_setting:
            continue
        try:
            with torch.no_grad():
                # Not normalized: that would turn zeros into other constants, which change no shape.
                model.module(torch.zeros(1, channels, *size, device=model.device))
        except Exception:
            continue
        size_setting = f"model.input_size={size[0]}" if size != configured else ""
        settings = " ".join(filter(None, (channels_setting, size_setting)))
        yield f"It takes {channels} × {size[0]} × {size[1]}: set {settings}."
