"""Sequences that repeat themselves, or don't: the task on which induction heads form."""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from examples.mechanisms.task import Sequences, Task
from examples.models import CircuitTransformer
from lightning_gradtrace.measures import in_context_learning_score, prefix_matching_score, second_half_accuracy


class Repeats(Task):
    """A share of the sequences repeat a random segment, the others are random throughout.

    The segment's length varies from sequence to sequence, so that looking back by a fixed number of positions, which
    one layer can learn, does not help.

    Args:
        n_tokens: size of the vocabulary.
        context: positions of a sequence.
        share: share of the sequences that repeat.
        n_held_out: sequences to measure on, which repeat after half the context.
    """

    def __init__(self, n_tokens: int = 64, context: int = 64, share: float = 0.5, n_held_out: int = 128) -> None:
        self.words = [f"t{token}" for token in range(n_tokens)]
        self.context = context
        self.share = share
        half = context // 2
        segment = self._random(n_held_out, half, torch.Generator().manual_seed(-1))
        self._held_out = segment.repeat(1, context // half + 2)[:, : context + 1]
        self._period = half
        # The middle half of the first and of the second repetition.
        self._early = slice(half // 4, half - half // 4)
        self._late = slice(half + half // 4, 2 * half - half // 4)

    def _random(self, n: int, length: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.words), (n, length), generator=generator)

    @override
    def sequences(self, n_samples: int, seed: int) -> Sequences:
        generator = torch.Generator().manual_seed(seed)
        text = self._random(n_samples, self.context + 1, generator)
        repeated = torch.rand(n_samples, generator=generator) < self.share
        period = torch.randint(self.context // 6, self.context // 2 + 1, (n_samples,), generator=generator)
        period = torch.where(repeated, period, self.context + 1)
        source = torch.arange(self.context + 1) % period[:, None]
        text = text.gather(1, source)
        patterns = pd.DataFrame({"repeated": repeated.numpy(), "period": period.numpy()})
        return Sequences(text[:, :-1].contiguous(), text[:, 1:].contiguous(), patterns)

    @override
    def measure(self, network: CircuitTransformer) -> dict[str, float]:
        tokens, targets, period = self._held_out[:, :-1], self._held_out[:, 1:], self._period
        logits = network(tokens)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        values = {
            "loss": losses.mean().item(),
            "second_half_accuracy": second_half_accuracy(logits, targets, period).item(),
            "in_context_learning": in_context_learning_score(losses, self._early, self._late).item(),
        }
        for layer, pattern in enumerate(network.patterns()):
            for head, score in enumerate(prefix_matching_score(pattern, period).tolist()):
                values[f"prefix_matching.{layer}.{head}"] = score
        return values
