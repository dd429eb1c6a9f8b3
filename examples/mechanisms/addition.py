"""Addition modulo p: the task on which grokking was taken apart."""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from examples.mechanisms.task import Sequences, Task
from examples.models import CircuitTransformer
from examples.models.circuit_model import IGNORE
from lightning_gradtrace.measures import (
    excluded_loss,
    fourier_basis,
    frequency_power,
    gini,
    key_frequencies,
    logit_frequency_power,
    restricted_loss,
    weight_norm,
)


class ModularAddition(Task):
    """``a b =`` with the answer ``a + b mod p``; a share of all pairs is for training.

    Source: Power et al., 2022; Nanda et al., 2023.

    Args:
        p: the modulus, odd.
        fraction: share of the pairs that is trained on.
        split_seed: of the division into training and test pairs.

    Attributes:
        tokens: all pairs, shape (p * p, 3), pair (a, b) in row a * p + b.
        answers: shape (p * p,).
        train: numbers of the training pairs, by sample.
        test: numbers of the others.
    """

    def __init__(self, p: int = 53, fraction: float = 0.4, split_seed: int = 0) -> None:
        self.p = p
        self.words = [*(str(number) for number in range(p)), "="]
        self.context = 3
        self.n_outputs = p
        a, b = torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij")
        self.tokens = torch.stack([a.flatten(), b.flatten(), torch.full((p * p,), p)], 1)
        self.answers = (a + b).flatten() % p
        order = torch.randperm(p * p, generator=torch.Generator().manual_seed(split_seed))
        self.train, self.test = order.split([int(fraction * p * p), p * p - int(fraction * p * p)])

    @override
    def sequences(self, n_samples: int, seed: int) -> Sequences:
        tokens, answers = self.tokens[self.train], self.answers[self.train]
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -1] = answers
        patterns = pd.DataFrame({"a": tokens[:, 0].numpy(), "b": tokens[:, 1].numpy(), "answer": answers.numpy()})
        return Sequences(tokens, targets, patterns)

    def logits(self, network: CircuitTransformer) -> Tensor:
        """Return the answer's logits of all pairs, shape (p * p, p), float64, of a network on the CPU."""
        return network(self.tokens)[:, -1].double()

    @override
    def measure(self, network: CircuitTransformer) -> dict[str, float]:
        logits = self.logits(network)
        right = logits.argmax(-1) == self.answers
        embedding = network.embedding.weight.detach()[: self.p].double()
        values = {
            "weight_norm": weight_norm(network.parameters()).item(),
            "embedding_gini": gini(frequency_power(embedding)).item(),
        }
        for name, rows in (("train", self.train), ("test", self.test)):
            values[f"{name}_loss"] = F.cross_entropy(logits[rows], self.answers[rows]).item()
            values[f"{name}_accuracy"] = right[rows].double().mean().item()
        for frequency, share in enumerate(logit_frequency_power(logits).tolist(), start=1):
            values[f"logit_power.{frequency}"] = share
        return values

    def progress(self, logits: Tensor, frequencies: list[int]) -> dict[str, float]:
        """Return restricted and excluded loss for key frequencies, which are known only at the end.

        Args:
            logits: from `logits`.
            frequencies: of the trained network, see `key_frequencies`.
        """
        return {
            "restricted_loss": restricted_loss(logits, self.answers, frequencies).item(),
            "excluded_loss": excluded_loss(logits, self.answers, frequencies, self.train).item(),
        }

    def final_frequencies(self, network: CircuitTransformer) -> list[int]:
        """Return the key frequencies of a trained network, from its logits; the strongest if none is strong."""
        power = logit_frequency_power(self.logits(network))
        return key_frequencies(power) or [int(power.argmax()) + 1]


def number_waves(p: int, n_others: int = 0) -> Tensor:
    """Return the Fourier basis over the first p rows of a table, zero on the others; see `fourier_basis`.

    Args:
        p: the modulus.
        n_others: rows of the table for tokens that are no numbers.

    Returns:
        Shape (p, p + n_others): constant, cosine and sine of frequency 1, of 2, ...
    """
    return F.pad(fourier_basis(p), (0, n_others))
