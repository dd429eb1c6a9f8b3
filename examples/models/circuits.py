"""Small transformers whose mechanisms can be taken apart: attention-only, ReLU, GELU and SoLU, one to four layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["relu", "gelu", "solu"]


class Attention(nn.Module):
    """Causal attention with one weight per head: ``W_Q``, ``W_K``, ``W_V`` (head, width, head width), ``W_O`` back.

    Args:
        width: features of the residual stream.
        n_heads: number of heads.
        head_width: features of a head.

    Attributes:
        pattern: probabilities (batch, head, query, key) of the last forward pass, detached.
        head_scale: factor of each head's output, shape (head,); zero switches a head off.
    """

    head_scale: Tensor

    def __init__(self, width: int, n_heads: int, head_width: int) -> None:
        super().__init__()
        self.head_width = head_width
        for name in ("W_Q", "W_K", "W_V"):
            self.register_parameter(name, nn.Parameter(torch.randn(n_heads, width, head_width) / math.sqrt(width)))
        self.W_O = nn.Parameter(torch.randn(n_heads, head_width, width) / math.sqrt(n_heads * head_width))
        self.register_buffer("head_scale", torch.ones(n_heads), persistent=False)
        self.pattern: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return what attention adds to `x` (batch, position, width)."""
        query = torch.einsum("btd,hde->bhte", x, self.W_Q)
        key = torch.einsum("btd,hde->bhte", x, self.W_K)
        value = torch.einsum("btd,hde->bhte", x, self.W_V)
        scores = query @ key.transpose(-1, -2) / math.sqrt(self.head_width)
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        pattern = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        self.pattern = pattern.detach()
        mixed = (pattern @ value) * self.head_scale[:, None, None]
        return torch.einsum("bhte,hed->btd", mixed, self.W_O)


class SoLU(nn.Module):
    """``x softmax(x)``, then layer norm. Source: Elhage et al., 2022, "Softmax Linear Units".

    Args:
        width: number of features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to the last axis of `x`."""
        return self.norm(x * x.softmax(-1))


def _activation(name: Activation, hidden: int) -> nn.Module:
    made: dict[str, nn.Module] = {"relu": nn.ReLU(), "gelu": nn.GELU(), "solu": SoLU(hidden)}
    if name not in made:
        raise ValueError(f"`activation` is {name!r}; expected one of {', '.join(f'`{n}`' for n in made)}")
    return made[name]


class CircuitTransformer(nn.Module):
    """Decoder-only transformer with learned positions, no biases in attention and, on request, no norms.

    ``n_layers=1, width=128, n_heads=4, hidden=512, activation="relu", norm=False`` is the modular-addition network of
    Nanda et al., 2023; ``hidden=0`` is attention-only, as in Elhage et al., 2021.

    Args:
        n_tokens: size of the input vocabulary.
        context: longest sequence.
        n_layers: number of layers, 1 to 4 in the experiments.
        width: features of the residual stream.
        n_heads: heads per layer, each of ``width // n_heads`` features; one number for all layers or one for each.
        hidden: neurons of the MLP after every attention; 0 for none.
        activation: of the MLP.
        norm: layer norm before every attention and MLP and before the head.
        n_outputs: number of logits, None for `n_tokens`.

    Raises:
        ValueError: the heads don't divide the width or are not one number per layer, or the activation is unknown.

    Example:
        >>> network = CircuitTransformer(n_tokens=11, context=6, n_layers=2, width=8, n_heads=2)
        >>> network(torch.zeros(3, 5, dtype=torch.long)).shape, len(network.patterns())
        (torch.Size([3, 5, 11]), 2)
    """

    def __init__(
        self,
        n_tokens: int,
        context: int,
        n_layers: int = 2,
        width: int = 64,
        n_heads: int | Sequence[int] = 4,
        hidden: int = 0,
        activation: Activation = "gelu",
        norm: bool = False,
        n_outputs: int | None = None,
    ) -> None:
        super().__init__()
        heads = [n_heads] * n_layers if isinstance(n_heads, int) else list(n_heads)
        if len(heads) != n_layers or any(n < 1 or width % n for n in heads):
            raise ValueError(
                f"`width` is {width}, `n_heads` {n_heads} for {n_layers} layers; expected heads that divide the width, "
                "one number for all layers or one for each"
            )
        self.embedding = nn.Embedding(n_tokens, width)
        self.position = nn.Embedding(context, width)
        self.attention = nn.ModuleList([Attention(width, n, width // n) for n in heads])
        mlps = [
            nn.Sequential(nn.Linear(width, hidden), _activation(activation, hidden), nn.Linear(hidden, width))
            for _ in range(n_layers if hidden else 0)
        ]
        self.mlp = nn.ModuleList(mlps)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(n_layers + len(mlps) + 1 if norm else 0)])
        self.head = nn.Linear(width, n_tokens if n_outputs is None else n_outputs, bias=False)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=1 / math.sqrt(width))
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, position, token) for `tokens` (batch, position)."""
        stream = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        norms = iter(self.norms)
        for layer, attention in enumerate(self.attention):
            stream = stream + attention(next(norms)(stream) if self.norms else stream)
            if self.mlp:
                stream = stream + self.mlp[layer](next(norms)(stream) if self.norms else stream)
        return self.head(next(norms)(stream) if self.norms else stream)

    def patterns(self) -> list[Tensor]:
        """Return the attention probabilities of the last forward pass, (batch, head, query, key) per layer.

        Raises:
            RuntimeError: there was no forward pass.
        """
        found = [attention.pattern for attention in self.attention]
        if any(pattern is None for pattern in found):
            raise RuntimeError("`patterns` was called before any forward pass, whose attention it returns")
        return found  # type: ignore[return-value]
