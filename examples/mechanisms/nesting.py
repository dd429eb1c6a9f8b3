"""Generated text with nested brackets of several kinds: which head finds the bracket that has to be closed?"""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from examples.mechanisms.task import Sequences, Task
from examples.models import CircuitTransformer
from lightning_gradtrace.measures import attention_to, bracket_depth, closing_accuracy, innermost_open

KINDS = ("()", "[]", "{}")


class Nesting(Task):
    """Random words among brackets that open at random and close in the right order.

    Args:
        context: positions of a sequence.
        n_words: random words besides the brackets.
        p_open: probability that a bracket opens.
        p_close: probability that the innermost open bracket closes.
        max_depth: most brackets open at a time.
        n_held_out: sequences to measure on.
    """

    def __init__(
        self,
        context: int = 40,
        n_words: int = 20,
        p_open: float = 0.2,
        p_close: float = 0.2,
        max_depth: int = 4,
        n_held_out: int = 256,
    ) -> None:
        self.words = [bracket for kind in KINDS for bracket in kind] + [f"w{word}" for word in range(n_words)]
        self.opening = [self.words.index(kind[0]) for kind in KINDS]
        self.closing = [self.words.index(kind[1]) for kind in KINDS]
        self.context = context
        self.p_open, self.p_close, self.max_depth = p_open, p_close, max_depth
        self._held_out = self._text(n_held_out, seed=-1)

    def _text(self, n: int, seed: int) -> Tensor:
        """Return n sequences of context + 1 tokens; all of them grow together, one position at a time."""
        generator = torch.Generator().manual_seed(seed)
        stack = torch.zeros(n, self.max_depth, dtype=torch.long)
        depth = torch.zeros(n, dtype=torch.long)
        rows = torch.arange(n)
        columns = []
        for _ in range(self.context + 1):
            chance = torch.rand(n, generator=generator)
            kind = torch.randint(len(KINDS), (n,), generator=generator)
            token = torch.randint(2 * len(KINDS), len(self.words), (n,), generator=generator)
            opens = (chance < self.p_open) & (depth < self.max_depth)
            closes = (chance >= self.p_open) & (chance < self.p_open + self.p_close) & (depth > 0)
            token[opens] = 2 * kind[opens]
            token[closes] = 2 * stack[rows[closes], depth[closes] - 1] + 1
            stack[rows[opens], depth[opens]] = kind[opens]
            depth = depth + opens.long() - closes.long()
            columns.append(token)
        return torch.stack(columns, 1)

    @override
    def sequences(self, n_samples: int, seed: int) -> Sequences:
        text = self._text(n_samples, seed)
        depth = bracket_depth(text, self.opening, self.closing)
        closes = torch.isin(text[:, 1:], torch.tensor(self.closing))
        patterns = pd.DataFrame(
            {
                "n_closing": closes.sum(1).numpy(),
                "max_depth": depth.amax(1).numpy(),
                # Closing a bracket right after its own content of words needs no memory of an outer one.
                "closes_outer": (closes & (depth[:, :-1] >= 2)).any(1).numpy(),
            }
        )
        return Sequences(text[:, :-1].contiguous(), text[:, 1:].contiguous(), patterns)

    @override
    def measure(self, network: CircuitTransformer) -> dict[str, float]:
        tokens, targets = self._held_out[:, :-1], self._held_out[:, 1:]
        logits = network(tokens)
        values = {
            "loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item(),
            "closing_accuracy": closing_accuracy(logits, targets, self.closing).item(),
        }
        bracket = innermost_open(tokens, self.opening, self.closing)
        # A bracket that is being read needs no looking for.
        far = torch.isin(targets, torch.tensor(self.closing)) & (bracket < torch.arange(self.context))
        for layer, pattern in enumerate(network.patterns()):
            for head, score in enumerate(attention_to(pattern, bracket.clamp(min=0), far).tolist()):
                values[f"matching.{layer}.{head}"] = score
        return values
