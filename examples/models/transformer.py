"""The network of the 2023 reference experiment."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PositionEncoding(nn.Module):
    """Add sines (even features) and cosines (odd features) of the position, then drop out.

    Source: Vaswani et al., 2017, section 3.5. The code published with the 2023 experiment had sines in both halves.

    Args:
        width: number of features.
        dropout: probability.
        max_length: longest sequence.

    Example:
        >>> encode = PositionEncoding(4, dropout=0.0)
        >>> encode(torch.zeros(2, 1, 4))[:, 0]
        tensor([[0.0000, 1.0000, 0.0000, 1.0000],
                [0.8415, 0.5403, 0.0100, 0.9999]])
    """

    table: Tensor

    def __init__(self, width: int, dropout: float, max_length: int = 5000) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        position = torch.arange(max_length).unsqueeze(1)
        rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
        table = torch.zeros(max_length, 1, width)
        table[:, 0, 0::2] = torch.sin(position * rate)
        table[:, 0, 1::2] = torch.cos(position * rate[: width // 2])
        self.register_buffer("table", table, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Encode the positions of `features` (position, batch, width)."""
        return self.dropout(features + self.table[: features.shape[0]])


class ReferenceTransformer(nn.Module):
    """Post-norm `nn.TransformerEncoder` language model, position first (docs/concepts.md, 6).

    With the defaults and 28,782 tokens it has 12,267,582 parameters, 726,000 of them outside embedding and head.

    Args:
        n_tokens: size of the vocabulary.
        width: features of the residual stream (d).
        n_heads: attention heads.
        hidden: neurons between the two linear maps of a layer.
        n_layers: encoder layers.
        dropout: probability, also in the position encoding.

    Example:
        >>> network = ReferenceTransformer(n_tokens=28_782)
        >>> sum(p.numel() for p in network.parameters())
        12267582
        >>> network.eval()(torch.zeros(35, 2, dtype=torch.long)).shape
        torch.Size([35, 2, 28782])
    """

    def __init__(
        self,
        n_tokens: int,
        width: int = 200,
        n_heads: int = 4,
        hidden: int = 200,
        n_layers: int = 3,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.scale = math.sqrt(width)
        self.embedding = nn.Embedding(n_tokens, width)
        self.position = PositionEncoding(width, dropout)
        layer = nn.TransformerEncoderLayer(width, n_heads, hidden, dropout)
        # Nested tensors only serve padded batches, and asking for them with position-first input is a warning.
        self.encoder = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, n_tokens)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.head.weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (position, batch, token) of the next token for `tokens` (position, batch)."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[0], device=tokens.device)
        features = self.position(self.embedding(tokens) * self.scale)
        return self.head(self.encoder(features, mask=mask, is_causal=True))
