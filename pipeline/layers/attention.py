"""Layers whose units are the heads of an attention module: what each writes, and what it attends to.

Two layers are added for each attention module `A` of a transformer (Vaswani et al. 2017, "Attention Is All You Need",
section 3.2.2), with one unit for each of its H heads:

* `A@heads`: the norm of what a head adds to the output of `A` at each token, ‖W_h Σ_j a_hij v_hj‖, where W_h are the
  columns of the output projection for head h (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits":
  heads are independent and additive);
* `A@attention`: the attention a_hij that the class token pays to each token, as in Caron et al. 2021 (DINO, arXiv
  2104.14294, figure 1); without a class token, the mean over all tokens that pay it.

An attention module is taken if what is computed here equals what it computes, on an image of noise. Modules with
rotary positions or normalized queries therefore have heads, but no attention.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.errors import AtlasError
from pipeline.layers.dictionaries import SEPARATOR
from pipeline.layers.finding import ArrayLayer, Layer, Side
from pipeline.layers.layouts import Axes, as_maps
from pipeline.layers.tracing import run_on_noise, tensor_of, trace_of
from pipeline.models.loading import Model

# What is read: the outputs of all heads side by side; queries, keys and values side by side; or the input of a
# `torch.nn.MultiheadAttention`, whose projections are no modules.
Reads = Literal["mixed", "qkv", "input"]

HEADS, ATTENTION = "heads", "attention"
# Kinds of the layers: "attention" is that of the modules.
KINDS = {HEADS: "heads", ATTENTION: "attention pattern"}
# Parameters with these names are class tokens, and those are the tokens that no image has a patch for.
CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "cls_embedding")
REGISTERS = ("reg_token", "register_tokens", "registers")
# Relative and absolute difference to what the module computes, in single precision.
RELATIVE, ABSOLUTE = 1e-3, 1e-5
# Keeps the gradient of a norm finite at 0.
SMALLEST = 1e-12


@dataclasses.dataclass(frozen=True)
class AttentionLayer(ArrayLayer):
    """A layer with a unit for each head of an attention module.

    The fields of `Layer` state where the module is read; `channels` is H.

    Attributes:
        reads: What is read there.
        of: "heads" for what the heads write, "attention" for what they attend to.
        by_class: Whether attention is that of the class token; else the mean over all tokens.
        gram: W_hᵀ W_h of each head, (H, d, d) float32.
        weight: For `reads="input"`, the projection to queries, keys and values, (3 D, D) float32.
        bias: Its bias, (3 D,) float32.
    """

    reads: Reads = "mixed"
    of: str = HEADS
    by_class: bool = True
    gram: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0, 0), np.float32), compare=False)
    weight: np.ndarray | None = dataclasses.field(default=None, compare=False)
    bias: np.ndarray | None = dataclasses.field(default=None, compare=False)

    @property
    def tap(self) -> list[Any]:
        """All attributes that determine the values of this layer, for digests."""
        return [*super().tap, self.reads, self.of, self.by_class]

    @property
    def of_channels(self) -> bool:
        """Whether the units are channels of the network; False."""
        return False

    @property
    def has_effects(self) -> bool:
        """Whether effects are measured; False: neither norms nor attention have a derivative of their own."""
        return False

    def maps(self, output: Tensor, batch: int, size: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        """Return the values of the heads, (B, H, height, width) float32; see `Layer.maps`."""
        if self.reads == "mixed":
            mixed = super().maps(output, batch, size).float()
        else:
            attention, values = self.attention(output)
            if self.of == ATTENTION:
                paid = attention[:, :, 0] if self.by_class else attention.mean(2)
                return self._arranged(paid.transpose(1, 2), batch, size)
            mixed = self._arranged(side_by_side(attention, values), batch, size)
        written = mixed.unflatten(1, (self.channels, -1))
        gram = self._on(mixed.device)["gram"]
        squares = (torch.einsum("bhdyx,hde->bheyx", written, gram) * written).sum(2)
        return squares.clamp(min=SMALLEST).sqrt()

    def attention(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return attention (B, H, N, N) and values (B, H, N, d) of what is read, unless that is mixed already."""
        tokens = (output.transpose(0, 1) if self.layout == "tokens_first" else output).float()
        if self.reads == "input":
            held = self._on(tokens.device)
            tokens = F.linear(tokens, held["weight"], held["bias"])
        parts = (part.unflatten(-1, (self.channels, -1)).transpose(1, 2) for part in tokens.chunk(3, -1))
        queries, keys, values = parts
        return (queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5).softmax(-1), values

    def _arranged(self, tokens: Tensor, batch: int, size: tuple[float, float]) -> Tensor:
        """Return tokens (B, N, C) as maps."""
        return as_maps(tokens, Axes("tokens", self.prefix, self.grid), batch, self.part, size)

    @property
    def arrays(self) -> dict[str, np.ndarray | None]:
        """The arrays by name."""
        return {"gram": self.gram, "weight": self.weight, "bias": self.bias}


def side_by_side(attention: Tensor, values: Tensor) -> Tensor:
    """Return the outputs of all heads side by side, (B, N, H · d)."""
    return (attention @ values).transpose(1, 2).flatten(2)


@dataclasses.dataclass
class _Seen:
    """What one attention module read and returned for an image of noise."""

    qkv: Tensor | None = None
    mixed: Tensor | None = None
    input: Tensor | None = None
    output: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class _Module:
    """An attention module.

    Attributes:
        path: Its path.
        heads: Number of heads.
        module: The module.
    """

    path: str
    heads: int
    module: nn.Module

    @property
    def projection(self) -> nn.Linear | None:
        """The linear layer that reads the outputs of all heads side by side."""
        projection = getattr(self.module, "out_proj" if self.is_torch else "proj", None)
        return projection if isinstance(projection, nn.Linear) else None

    @property
    def is_torch(self) -> bool:
        """Whether it is PyTorch's own."""
        return isinstance(self.module, nn.MultiheadAttention)

    def gram(self) -> np.ndarray:
        """Return W_hᵀ W_h of each head."""
        assert self.projection is not None
        weight = self.projection.weight.detach().float().cpu().unflatten(1, (self.heads, -1))
        return torch.einsum("ohd,ohe->hde", weight, weight).numpy()


def with_attention(model: Model, layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers with those of attention heads, each after the layer that it is computed from.

    Args:
        model: The network.
        layers: Its layers.

    Raises:
        AtlasError: If the network has no attention module with heads that can be read.
    """
    calls = trace_of(model).calls
    called = {call.path: sum(other.path == call.path for other in calls) for call in calls}
    modules = [
        _Module(path, heads, module)
        for path, module in model.module.named_modules()
        if isinstance(heads := getattr(module, "num_heads", None), int) and called.get(path) == 1
    ]
    modules = [module for module in modules if module.projection is not None]
    seen = _observe(model, modules)
    by_class = _has_class_token(model)
    added: dict[str, list[Layer]] = {}
    for module in modules:
        for source, layer in _layers_of(module, seen[module.path], {layer.name: layer for layer in layers}, by_class):
            added.setdefault(source, []).append(layer)
    if not added:
        raise AtlasError(
            f"layers.heads=true, but {model.name} has no attention module whose heads can be read: one with num_heads "
            "and a linear layer `proj` or, as in torch.nn.MultiheadAttention, `out_proj`. Leave layers.heads out."
        )
    return [one for layer in layers for one in (layer, *added.get(layer.name, ()))]


def _observe(model: Model, modules: Sequence[_Module]) -> dict[str, _Seen]:
    """Return what attention modules read and return for an image of noise, by path."""
    seen = {module.path: _Seen() for module in modules}
    handles = []

    def watch(module: nn.Module, path: str, field: str, side: Side) -> None:
        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            setattr(seen[path], field, tensor_of((args, kwargs)))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            setattr(seen[path], field, tensor_of(output))

        register = module.register_forward_hook if side == "out" else module.register_forward_pre_hook
        hook, options = (after, {}) if side == "out" else (before, {"with_kwargs": True})
        handles.append(register(hook, **options))  # type: ignore[arg-type]

    for one in modules:
        watch(one.module, one.path, "input", "in")
        watch(one.module, one.path, "output", "out")
        if not one.is_torch:
            watch(one.module.proj, one.path, "mixed", "in")  # type: ignore[arg-type]
            if isinstance(getattr(one.module, "qkv", None), nn.Linear):
                watch(one.module.qkv, one.path, "qkv", "out")  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            run_on_noise(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _layers_of(one: _Module, seen: _Seen, layers: dict[str, Layer], by_class: bool) -> list[tuple[str, AttentionLayer]]:
    """Return the layers of a module, each with the name of the layer that it follows."""
    name = f"{one.path}.{'out_proj' if one.is_torch else 'proj'}"
    source = layers.get(name) or layers.get(one.path)
    if source is None:
        return []
    arrays: dict[str, Any] = {"gram": one.gram()}
    if one.is_torch:
        weight, bias = getattr(one.module, "in_proj_weight", None), getattr(one.module, "in_proj_bias", None)
        if weight is None:
            return []
        zeros = torch.zeros(len(weight))
        arrays["weight"] = weight.detach().float().cpu().numpy()
        arrays["bias"] = (zeros if bias is None else bias.detach().float().cpu()).numpy()
        computed = _layer(source, one, HEADS, by_class, reads="input", module=one.path, side="in", **arrays)
        attention = _layer(source, one, ATTENTION, by_class, reads="input", module=one.path, side="in", **arrays)
        return [(source.name, computed), (source.name, attention)] if _agrees_torch(one, computed, seen) else []
    found = []
    if seen.mixed is not None and seen.mixed.shape[-1] % one.heads == 0:
        found.append(_layer(source, one, HEADS, by_class, reads="mixed", module=name, side="in", **arrays))
    if seen.qkv is not None and seen.mixed is not None and source.layout in ("tokens", "tokens_first"):
        tapped = {"reads": "qkv", "module": f"{one.path}.qkv", "side": "out"}
        attention = _layer(source, one, ATTENTION, by_class, **tapped, **arrays)
        if _agrees(side_by_side(*attention.attention(seen.qkv)), seen.mixed):
            found.append(attention)
    return [(source.name, layer) for layer in found]


def _layer(source: Layer, one: _Module, of: str, by_class: bool, **changes: Any) -> AttentionLayer:
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(Layer)}
    fields |= {
        "name": f"{one.path}{SEPARATOR}{of}",
        "kind": KINDS[of],
        "call": 1,
        "channels": one.heads,
        "alias": "",
        "rectified": False,
        "linear_in_pixels": False,
        "depthwise": False,
    }
    return AttentionLayer(**{**fields, "of": of, "by_class": by_class and source.prefix > 0, **changes})


def _agrees_torch(one: _Module, layer: AttentionLayer, seen: _Seen) -> bool:
    """Return whether the output of PyTorch's module is what a layer computes from its input."""
    if seen.input is None or seen.output is None or seen.input.shape != seen.output.shape or one.projection is None:
        return False
    if layer.layout not in ("tokens", "tokens_first"):
        return False
    expected = F.linear(side_by_side(*layer.attention(seen.input)), one.projection.weight.float(), one.projection.bias)
    return _agrees(expected.transpose(0, 1) if layer.layout == "tokens_first" else expected, seen.output)


def _agrees(computed: Tensor, expected: Tensor) -> bool:
    if computed.shape != expected.shape:
        return False
    scale = float(expected.abs().max().clamp(min=1e-12))
    return torch.allclose(computed / scale, expected.float() / scale, RELATIVE, ABSOLUTE)


def _has_class_token(model: Model) -> bool:
    """Return whether the first token of a network belongs to no patch and is no register."""

    def has(names: Sequence[str]) -> bool:
        return any(
            isinstance(getattr(module, name, None), Tensor) for module in model.module.modules() for name in names
        )

    return has(CLASS_TOKENS) or not has(REGISTERS)
