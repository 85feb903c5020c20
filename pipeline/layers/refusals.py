"""Why a network does not take its input: what was observed, and advice that was tried on the network first."""

import inspect
import re
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.core.errors import AtlasError, first_line
from pipeline.models.loading import Model

# Sides in pixels that are tried where a network does not take the configured one, and the seconds spent on them.
SIDES = (224, 32, 28, 64, 96, 128, 160, 192, 227, 240, 256, 288, 299, 320, 336, 384, 448, 512)
PATIENCE = 10.0

DTYPE = re.compile(r"dtype|scalar type|should be the same|Half|Double|BFloat16|ComplexFloat", re.I)
CHANNELS = re.compile(r"to have (\d+) channels, but got (\d+) channels")


class NotTaken(AtlasError):
    """A network raised an error for `images` (B, C, H, W) in [0, 1]; `cause` is that error."""

    def __init__(self, model: Model, images: Tensor, cause: Exception) -> None:
        self.model, self.images, self.cause = model, images, cause
        shape = " × ".join(map(str, images.shape))
        super().__init__(
            f"{model.name} does not take {shape} (images × channels × height × width): "
            f"{type(cause).__name__}: {first_line(cause)}"
        )

    def explained(self) -> AtlasError:
        """Return the same error with the module that raised it, and with what to do about it where that is known."""
        path, module = _failing(self.model, self.images)
        place = f" (raised in {path}, a {type(module).__name__})" if path else ""
        advice = _advice(self.model, self.images, self.cause, module)
        return AtlasError(f"{self}{place}" + (f"\n{advice}" if advice else ""))


def _failing(model: Model, images: Tensor) -> tuple[str, nn.Module]:
    """Path of the innermost module that raises for `images`, and the module: the network itself where none does."""
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
    with torch.no_grad():
        model.module(model.normalise(images.to(next(model.module.parameters()).device)))


def _advice(model: Model, images: Tensor, cause: Exception, module: nn.Module) -> str:
    extra = required_inputs(model.module)
    if extra:
        return (
            f"Its forward needs {', '.join(extra)} beside the images. Let model.target name a builder that returns a "
            "module with one input, which passes something fixed for the rest:\n"
            "  class OneInput(nn.Module):\n"
            "      def __init__(self, net): super().__init__(); self.net = net\n"
            f"      def forward(self, images): return self.net(images, {', '.join(f'{name}=…' for name in extra)})"
        )
    text = str(cause)
    if isinstance(module, nn.Conv1d):
        return (
            "It takes sequences (batch × channels × length) and is not a network of images. A builder may return a "
            "module that makes a sequence of an image, as images.flatten(2) does."
        )
    if isinstance(module, nn.Conv3d):
        return (
            "It takes clips (batch × channels × frames × height × width). A builder may return a module that repeats "
            "the image: self.net(images[:, :, None].expand(-1, -1, 8, -1, -1))."
        )
    if DTYPE.search(text):
        return (
            "Its weights are float32 here, and its forward converts to another type (.half(), .double(), …). Convert "
            "to the type of the weights instead: images.to(self.conv.weight.dtype)."
        )
    return next(_working(model, images, text), "")


def required_inputs(module: nn.Module) -> list[str]:
    """Names of the inputs of a module's forward that have no default, beside the first one."""
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return []
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in named[1:] if p.default is p.empty]


def _working(model: Model, images: Tensor, text: str) -> Iterator[str]:
    """Settings with which the network runs, each tried before it is named."""
    began = time.monotonic()
    match = CHANNELS.search(text)
    channels = int(match[1]) if match and int(match[2]) == images.shape[1] else images.shape[1]
    named = f"model.channels={channels}" if channels != images.shape[1] else ""
    own = (images.shape[2], images.shape[3])
    for size in (own, *((side, side) for side in SIDES)):
        if time.monotonic() - began > PATIENCE:
            return
        if size == own and not named:
            continue
        try:
            with torch.no_grad():
                # Of zeros, any mean and any scale make other constants: a network takes those as well.
                model.module(torch.zeros(1, channels, *size, device=next(model.module.parameters()).device))
        except Exception:
            continue
        sized = f"model.input_size={size[0]}" if size != own else ""
        yield f"It takes {channels} × {size[0]} × {size[1]}: set {' '.join(filter(None, (named, sized)))}."
