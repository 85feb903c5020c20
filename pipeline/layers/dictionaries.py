"""Layers whose units are the entries of a dictionary: latents of a sparse autoencoder, or any directions.

A *dictionary* of N latents belongs to a layer of C channels. Its encoder computes the value of each latent at each
position of the layer's map, and its decoder says which change of the map a latent stands for.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pipeline.layers.finding import ArrayLayer, Layer, on_device

# What follows the encoder. "none" leaves its values as they are; "relu" sets negative ones to 0; "topk" keeps the k
# largest of a position if they are positive; "jumprelu" keeps those above a threshold of each latent.
Gate = Literal["none", "relu", "topk", "jumprelu"]
GATES: tuple[str, ...] = get_args(Gate)

# Separates the name of a layer from that of its dictionary.
SEPARATOR = "@"
KIND = "dictionary"

# Encoded values of at most so many images and positions are held beside the result, in bytes.
BLOCK_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Dictionary:
    """N latents of a space of C channels: z = gate(W x + b), x ≈ D z + c.

    ReLU: Bricken et al. 2023, "Towards Monosemanticity"; top-k: Gao et al. 2024, arXiv 2406.04093; JumpReLU:
    Rajamanoharan et al. 2024, arXiv 2407.14435. A batch top-k dictionary (Bussmann et al. 2024, arXiv 2412.06410) is a
    JumpReLU one with the threshold that its training found.

    Attributes:
        encoder: W, (N, C) float32.
        bias: b, (N,) float32.
        decoder: D transposed, (N, C) float32: row i is the change of the map for one unit of latent i.
        center: c, (C,) float32.
        gate: What follows the encoder.
        k: Number of latents that "topk" keeps.
        threshold: Thresholds of "jumprelu", (N,) float32.
        digest: sha256 of all of it.
        facts: What is known of its making, as pairs of names and values.
    """

    encoder: np.ndarray
    bias: np.ndarray
    decoder: np.ndarray
    center: np.ndarray
    gate: Gate = "none"
    k: int = 0
    threshold: np.ndarray | None = None
    digest: str = ""
    facts: tuple[tuple[str, str | float], ...] = ()

    @property
    def latents(self) -> int:
        """Number of latents, N."""
        return len(self.encoder)

    @property
    def channels(self) -> int:
        """Number of channels of the layer, C."""
        return self.encoder.shape[1]

    @property
    def arrays(self) -> dict[str, np.ndarray | None]:
        """What latents are computed from, and what they stand for."""
        return {"encoder": self.encoder, "bias": self.bias, "decoder": self.decoder, "threshold": self.threshold}

    @property
    def sparse(self) -> bool:
        """Whether most latents are exactly 0 at a position."""
        return self.gate != "none"


@dataclasses.dataclass(frozen=True)
class DictionaryLayer(ArrayLayer):
    """A layer of N latents that are computed from the maps of another layer.

    The fields of `Layer` state where the other layer is read; `channels` is N.

    Attributes:
        base: The other layer.
        dictionary: The dictionary.
        passes_gate: Whether gradients pass the gate as if it were not there; see `ungated`.
    """

    base: Layer | None = dataclasses.field(default=None, compare=False)
    dictionary: Dictionary | None = dataclasses.field(default=None, compare=False)
    passes_gate: bool = False

    @classmethod
    def on(cls, layer: Layer, name: str, dictionary: Dictionary) -> "DictionaryLayer":
        """Return the layer of the latents of a dictionary `name` of `layer`."""
        fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(Layer)}
        changes = {
            "name": f"{layer.name}{SEPARATOR}{name}",
            "kind": KIND,
            "channels": dictionary.latents,
            "alias": f"{layer.alias}{SEPARATOR}{name}" if layer.alias else "",
            # Zero is a threshold of latents behind a gate, and an arbitrary value of a dot product.
            "rectified": dictionary.sparse,
            "linear_in_pixels": False,
            "depthwise": False,
        }
        return cls(**{**fields, **changes}, base=layer, dictionary=dictionary)

    @property
    def tap(self) -> list[Any]:
        """All attributes that determine the values of this layer, for digests."""
        return [*super().tap, self._dictionary.digest]

    @property
    def of_channels(self) -> bool:
        """Whether the units are channels of the network; False."""
        return False

    @property
    def description(self) -> dict[str, Any]:
        """What is known of the dictionary, as plain data: the layer that it reads, its gate, and its facts."""
        assert self.base is not None
        dictionary = self._dictionary
        described = {"reads": self.base.name, "channels": dictionary.channels, "gate": dictionary.gate}
        if dictionary.gate == "topk":
            described["k"] = dictionary.k
        return {**described, "facts": dict(dictionary.facts), "sha256": dictionary.digest}

    @property
    def source(self) -> Layer:
        """The layer that is read, under the name of this one."""
        assert self.base is not None
        return dataclasses.replace(self.base, name=self.name, field=self.field)

    @property
    def ungated(self) -> "DictionaryLayer":
        """The layer with the same values, and gradients as if all latents were active: those of W x + b.

        A latent that is 0 everywhere on an image has no other gradient that could raise it, as a channel behind a ReLU
        has none; channels are read before their activation function.
        """
        layer = dataclasses.replace(self, passes_gate=True)
        layer.__dict__["_held"] = self._held
        return layer

    @property
    def _dictionary(self) -> Dictionary:
        assert self.dictionary is not None
        return self.dictionary

    def maps(self, output: Tensor, batch: int, size: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        """Return the values of the latents, (B, N, H, W) float32; see `Layer.maps`."""
        base = super().maps(output, batch, size)
        if torch.is_grad_enabled() and base.requires_grad:
            return self._encoded(base)
        per_image = 4 * self.channels * base.shape[2] * base.shape[3]
        step = max(1, BLOCK_BYTES // max(1, per_image))
        if step >= len(base):
            return self._encoded(base)
        return torch.cat([self._encoded(base[start : start + step]) for start in range(0, len(base), step)])

    def slopes(self, gradient: Tensor, batch: int) -> Tensor:
        """Return the derivative along the decoder of each latent, (B, N, H, W); see `Layer.slopes`."""
        maps = super().maps(gradient, batch).float()
        return (maps.permute(0, 2, 3, 1) @ self._on(maps.device)["decoder"].T).permute(0, 3, 1, 2)

    def set_channels(self, maps: Tensor, channels: Sequence[int], values: np.ndarray) -> None:
        """Change the maps of the other layer so that one latent of each image gets a value; see `Layer.set_channels`.

        The map changes by (value − z) times the decoder's row. What the dictionary does not reconstruct, and what other
        latents stand for, stays as it is.
        """
        tensors = self._on(maps.device)
        # The images are copies of one.
        latents = self._encoded(maps[:1].float())[0]
        for image, (channel, value) in enumerate(zip(channels, values, strict=True)):
            change = float(value) - latents[channel]
            maps[image] += (tensors["decoder"][channel, :, None, None] * change).to(maps.dtype)

    @property
    def arrays(self) -> dict[str, np.ndarray | None]:
        """The arrays by name."""
        return self._dictionary.arrays

    def _encoded(self, maps: Tensor) -> Tensor:
        """Return the latents (B, N, H, W) of maps (B, C, H, W)."""
        positions = maps.float().permute(0, 2, 3, 1)
        return _encode(self._dictionary, self._on(maps.device), positions, self.passes_gate).permute(0, 3, 1, 2)


def encode(dictionary: Dictionary, rows: Tensor) -> Tensor:
    """Return the latents of activations (…, C), (…, N) float32."""
    return _encode(dictionary, on_device(dictionary.arrays, rows.device), rows.float())


def _encode(dictionary: Dictionary, tensors: Mapping[str, Tensor], rows: Tensor, passes_gate: bool = False) -> Tensor:
    """Return the latents of activations (…, C); gradients pass closed gates with `passes_gate`."""
    values = torch.nn.functional.linear(rows, tensors["encoder"], tensors["bias"])
    if not dictionary.sparse:
        return values
    closed = _closed(dictionary, values.detach(), tensors.get("threshold"))
    if not values.requires_grad:
        return values.masked_fill_(closed, 0.0)
    if passes_gate:
        return values - values.detach().masked_fill(~closed, 0.0)
    return values.masked_fill(closed, 0.0)


def _closed(dictionary: Dictionary, values: Tensor, threshold: Tensor | None) -> Tensor:
    """Return where the gate sets values (…, N) to 0."""
    closed = values <= 0 if threshold is None else values <= threshold.clamp(min=0)
    if dictionary.gate == "topk" and dictionary.k < values.shape[-1]:
        kept = torch.zeros_like(closed).scatter_(-1, values.topk(dictionary.k, dim=-1).indices, True)
        closed |= ~kept
    return closed


def dictionary_layers(layers: Sequence[Layer]) -> list[DictionaryLayer]:
    """Return those of some layers whose units are latents."""
    return [layer for layer in layers if isinstance(layer, DictionaryLayer)]


def channel_layers(layers: Sequence[Layer]) -> list[Layer]:
    """Return those of some layers whose units are channels of the network."""
    return [layer for layer in layers if layer.of_channels]
