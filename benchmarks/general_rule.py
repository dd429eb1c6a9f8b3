"""What uses without a closed form cost: CPU time and memory of capture for layers that the general rule serves.

    python -m benchmarks.general_rule --rounds 7

One thread; forward and backward pass with and without the tape take turns in one process. `x plain` is the median of
the ratios within a round; shares are formed, nothing is selected or written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.output import markdown
from lightning_gradtrace.capture.engines.tape import TapeEngine
from lightning_gradtrace.capture.probing.probe import PermutationProbe

N, LENGTH, WIDTH, HEADS = 16, 64, 256, 4


class Attention(nn.Module):
    """Self-attention with a learned bias for every head and pair of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.bias = nn.Parameter(torch.zeros(HEADS, LENGTH, LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        """Attend; `scaled_dot_product_attention` receives the bias as its mask."""
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)


class ClassToken(nn.Module):
    """A class token ahead of the sequence, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate, then transform."""
        return self.layer(torch.cat([self.token.expand(len(x), -1, -1), x], 1))


class Recurrent(nn.Module):
    """One layer of a recurrent network."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.net = kind(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the states."""
        states: Tensor = self.net(x)[0]
        return states


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "linear layer, for comparison": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH)), "closed form"),
    "class token": (ClassToken, "`cat`"),
    "attention with a learned bias": (Attention, "`scaled_dot_product_attention`"),
    "nn.LSTM": (lambda: Recurrent(nn.LSTM), "`lstm`"),
    "nn.GRU": (lambda: Recurrent(nn.GRU), "`gru`"),
    "nn.RNN": (lambda: Recurrent(nn.RNN), "`rnn_tanh`"),
}


@dataclass
class Subject:
    """A model whose forward and backward pass can be timed with and without the tape."""

    model: nn.Module
    engine: TapeEngine
    x: Tensor

    def seconds(self, taped: bool) -> float:
        """Return the CPU time of one forward and backward pass."""
        parameters = dict(self.model.named_parameters())
        self.model.zero_grad()
        start = time.process_time()
        if taped:
            with self.engine.tape(parameters, self.x, N) as tape:
                self.model(self.x).square().sum().backward()
            self.engine.collect(tape, N, PermutationProbe(self.model, parameters, self.model, self.x, N, 0))
        else:
            self.model(self.x).square().sum().backward()
        return time.process_time() - start


def measure(rounds: int) -> pd.DataFrame:
    """Return the table of all models."""
    rows = []
    for name, (build, function) in MODELS.items():
        torch.manual_seed(0)
        subject = Subject(build(), TapeEngine(), torch.randn(N, LENGTH, WIDTH))
        for taped in (False, True, True):  # what is found out once is found out now
            subject.seconds(taped)
        pairs = [[subject.seconds(taped) for taped in (False, True)] for _ in range(rounds)]
        ratios = [with_tape / plain for plain, with_tape in pairs]
        numel = sum(p.numel() for p in subject.model.parameters())
        rows.append(
            {
                "model": name,
                "general rule for": function,
                "plain, ms": 1000 * statistics.median(plain for plain, _ in pairs),
                "x plain": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "shares, MB": 4 * N * numel / 2**20 if "`" in function else 0.0,
            }
        )
    return pd.DataFrame(rows).set_index("model")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    torch.set_num_threads(1)
    print(markdown(measure(parser.parse_args().rounds)))


if __name__ == "__main__":
    main()
