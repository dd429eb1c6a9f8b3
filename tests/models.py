"""Small models that use parameters in ways that layers don't: for `cases.py`. All map a batch to logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

VOCAB, WIDTH = 11, 8


class Positions(nn.Module):
    """Learned positions, looked up with shared indices of shape (T,) or (1, T), or sliced from a bare parameter."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.table = nn.Embedding(12, WIDTH)
        self.bare = nn.Parameter(torch.randn(12, WIDTH))
        self.types = nn.Embedding(2, WIDTH)
        self.register_buffer("ids", torch.arange(12)[None])
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        n, length = tokens.shape
        if self.kind == "shared":
            positions = self.table(self.ids[:, :length]) + self.bare[:length]
        elif self.kind == "flat":
            positions = self.table(torch.arange(length)) * self.bare[:length]
        else:  # a copy for each sample, as Hugging Face's position and token type ids may be
            positions = self.table(self.ids[:, :length].expand(n, -1)) + self.bare[:length].expand(n, length, WIDTH)
        types = self.types(torch.zeros_like(tokens))
        return self.head(torch.tanh(self.embedding(tokens) + positions + types))


class ImageTransformer(nn.Module):
    """Patches by a convolution, a class token expanded over the batch, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x.unflatten(1, (1, 4, 4))).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        return self.head(self.norm(self.layer(x))[:, 0])


class Latents(nn.Module):
    """Latents of the model's own, expanded over the batch and transformed before they attend to the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, WIDTH))
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.cross = nn.MultiheadAttention(WIDTH, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        latents = self.latents.unsqueeze(0).repeat(len(tokens), 1, 1)
        latents = latents + torch.relu(self.query(self.norm(latents)))
        found = self.cross(latents, x, x)[0]
        return self.head(torch.tanh(x) * found.mean(1, keepdim=True))


class Research(nn.Module):
    """A transformer in the style of interpretability research: einsum, (head, d_model, d_head), relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.W_E = nn.Parameter(torch.randn(VOCAB, WIDTH))
        self.W_pos = nn.Parameter(torch.randn(12, WIDTH))
        self.W_Q, self.W_K, self.W_V = (nn.Parameter(torch.randn(2, WIDTH, 4) / 3) for _ in range(3))
        self.b_Q = nn.Parameter(torch.randn(2, 4))
        self.W_O = nn.Parameter(torch.randn(2, 4, WIDTH) / 3)
        self.gain = nn.Parameter(torch.rand(WIDTH))
        self.bias = nn.Embedding(9, 2)
        self.slopes = nn.Parameter(torch.rand(2))
        self.W_U = nn.Parameter(torch.randn(WIDTH, VOCAB))
        self.register_buffer("keep", torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]))

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        x = self.W_E[tokens] + self.W_pos[:length]
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain
        q = torch.einsum("bpd,hde->bphe", x, self.W_Q) + self.b_Q
        k = torch.einsum("bpd,hde->bphe", x, self.W_K)
        v = torch.einsum("bpd,hde->bphe", x, self.W_V)
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / 2
        distance = (torch.arange(length)[None] - torch.arange(length)[:, None]).clamp(-4, 4)
        scores = scores + self.bias(distance + 4).permute(2, 0, 1).unsqueeze(0)
        scores += (self.slopes[:, None, None] * distance).to(scores.dtype)
        future = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        pattern = scores.masked_fill(future, float("-inf")).softmax(-1)
        z = torch.einsum("bhqk,bkhe->bqhe", pattern, v)
        x = x + torch.einsum("bqhe,hed->bqd", z, self.W_O * self.keep)
        return x @ self.W_U


class Adapted(nn.Module):
    """Weights that are computed: LoRA, weight norm, spectral norm, orthogonal, a mask, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.base = nn.Linear(WIDTH, WIDTH)
        self.A, self.B = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(WIDTH, 2))
        self.normed = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.spectral = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH), n_power_iterations=200)
        self.orthogonal = parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))
        self.parts = nn.ParameterList(torch.randn(4, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)
        self.register_buffer("mask", (torch.arange(WIDTH * WIDTH).view(WIDTH, WIDTH) % 3 > 0).float())

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + torch.tanh(F.linear(x, self.base.weight * self.mask + self.B @ self.A, self.base.bias))
        x = x + torch.tanh(self.base(x))  # derived there, plain here
        x = self.orthogonal(torch.tanh(self.normed(x))) + self.spectral(x)
        bias = torch.stack([part.sum(1) for part in self.parts]).flatten()
        parts = [part.unflatten(0, (2, 2)).flatten(0, 1) for part in self.parts]
        return self.head(F.linear(x, torch.cat(parts), bias))


class Experts(nn.Module):
    """A mixture of experts: every token goes to the two experts that its router prefers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.router = nn.Linear(WIDTH, 3, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, WIDTH)) for _ in range(3)
        )
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        shape = (*tokens.shape, WIDTH)
        x = self.embedding(tokens).reshape(-1, WIDTH)
        weight, choice = self.router(x).softmax(-1).topk(2, -1)
        if self.kind == "sorted":
            out = self._sorted(x, weight, choice)
        else:
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                if self.kind == "index":  # Mixtral of Hugging Face
                    rank, rows = torch.where((choice == number).T)
                    y = expert(x[None, rows].reshape(-1, WIDTH)) * weight[rows, rank, None]
                    out.index_add_(0, rows, y * self.scale)
                else:
                    chosen = (choice == number).any(-1)
                    y = expert(x[chosen]) * self.scale
                    share = (weight * (choice == number)).sum(-1)[chosen]
                    out[chosen] += y * share.unsqueeze(-1)
        return self.head(torch.tanh(x + out).view(shape))

    def _sorted(self, x: Tensor, weight: Tensor, choice: Tensor) -> Tensor:
        flat = choice.flatten()
        order = flat.argsort(stable=True)
        rows = x.index_select(0, order // 2)
        counts = torch.bincount(flat, minlength=3).tolist()
        parts = [expert(part) for expert, part in zip(self.experts, rows.split(counts), strict=True)]
        back = torch.cat(parts)[order.argsort()].view(-1, 2, WIDTH)
        return (back * weight.unsqueeze(-1) * self.scale).sum(1)


class Recurrent(nn.Module):
    """A recurrent network of torch."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool, **options: object) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.rnn = kind(WIDTH, 5, batch_first=batch_first, **options)
        self.head = nn.Linear(5 * (2 if self.rnn.bidirectional else 1), VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


class Cells(nn.Module):
    """Recurrent cells, stepped by hand from a state of zeros or a learned one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.lstm = nn.LSTMCell(WIDTH, WIDTH)
        self.gru = nn.GRUCell(WIDTH, WIDTH)
        self.own = nn.Linear(2 * WIDTH, WIDTH)
        self.first = nn.Parameter(torch.randn(WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        n = len(tokens)
        state, h, o = None, self.first.expand(n, WIDTH), x.new_zeros(n, WIDTH)
        rows = []
        for t in range(tokens.shape[1]):
            state = self.lstm(x[:, t], state)
            h = self.gru(state[0], h)
            o = torch.tanh(self.own(torch.cat([h, o], -1)))
            rows.append(self.head(o))
        return torch.stack(rows, 1)


class Sets(nn.Module):
    """Deep sets, modulated by parameters: hypernetwork, FiLM, gates, in-place operations on fresh tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Linear(6, WIDTH)
        self.hyper = nn.Linear(3, WIDTH * WIDTH)
        self.task = nn.Parameter(torch.randn(3))
        self.gamma, self.beta = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.randn(1, WIDTH))
        self.gate = nn.Linear(WIDTH, 2 * WIDTH)
        self.each = nn.Linear(6, 6 * 4)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        sets = torch.stack([x, x.flip(-1), x * 2], 1)
        pooled = torch.tanh(self.phi(sets)).sum(1)
        pooled = F.linear(pooled, self.hyper(self.task).view(WIDTH, WIDTH))  # a weight that a network makes
        pooled *= self.gamma
        pooled += self.beta
        a, b = self.gate(pooled).chunk(2, -1)
        own = torch.bmm(self.each(x).view(-1, 4, 6), x.unsqueeze(-1)).squeeze(-1)  # a weight for each sample
        return self.head(F.silu(a) * b / math.sqrt(2)) + own


class LastToken(nn.Module):
    """Takes every sample's last real token, by an index that the batch decides."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.embedding(tokens)))
        last = (tokens != 0).sum(1) - 1
        pooled = self.out(x[torch.arange(len(tokens)), last])
        best = x.gather(1, tokens.argmax(1)[:, None, None].expand(-1, 1, WIDTH))
        return self.head(x + pooled.unsqueeze(1) * best)


class Packed(nn.Module):
    """A recurrent network on sequences of unlike lengths, packed."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.rnn = kind(WIDTH, WIDTH, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens > 3).sum(1).clamp(min=1)
        packed = nn.utils.rnn.pack_padded_sequence(self.embedding(tokens), lengths, True, enforce_sorted=False)
        packed = packed._replace(data=self.norm(packed.data))
        out, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], True, total_length=tokens.shape[1])
        return self.head(torch.tanh(out))
