"""Brackets in real English: the documentation that comes with CPython."""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from examples.data import EnglishData
from examples.data.tokenizer import Vocabulary, tokenize
from examples.mechanisms.task import Sequences, Task
from examples.models import CircuitTransformer
from lightning_gradtrace.measures import attention_to, innermost_open


class Prose(Task):
    """Overlapping pieces of the text of `EnglishData`, whose words are the frequent ones.

    Args:
        context: positions of a sequence.
        stride: tokens from the start of a training piece to that of the next one.
        min_count: rarer words are unknown.
    """

    def __init__(self, context: int = 48, stride: int = 24, min_count: int = 5) -> None:
        tokens = {
            split: [tokenize(line) for line in lines] for split, lines in EnglishData(context=context).lines().items()
        }
        vocabulary = Vocabulary.from_lines(tokens["train"], min_count)
        self.words = vocabulary.words
        self.opening, self.closing = ([vocabulary.words.index(bracket)] for bracket in "()")
        self.context, self.stride = context, stride
        self._text = {
            split: torch.from_numpy(vocabulary.encode(word for line in lines for word in line))
            for split, lines in tokens.items()
        }

    def _pieces(self, split: str, stride: int) -> Tensor:
        return self._text[split].unfold(0, self.context + 1, stride)

    @override
    def sequences(self, n_samples: int, seed: int) -> Sequences:
        text = self._pieces("train", self.stride)
        closes = torch.isin(text[:, 1:], torch.tensor(self.closing))
        bracket = innermost_open(text[:, :-1], self.opening, self.closing)
        far = (closes & (bracket >= 0) & (bracket < torch.arange(self.context))).any(1)
        patterns = pd.DataFrame({"n_closing": closes.sum(1).numpy(), "closes_far": far.numpy()})
        return Sequences(text[:, :-1].contiguous(), text[:, 1:].contiguous(), patterns)

    @override
    def measure(self, network: CircuitTransformer) -> dict[str, float]:
        text = self._pieces("val", self.context)
        tokens, targets = text[:, :-1], text[:, 1:]
        logits = network(tokens)
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        bracket = innermost_open(tokens, self.opening, self.closing)
        closes = torch.isin(targets, torch.tensor(self.closing)) & (bracket >= 0)
        # A bracket that is being read needs no looking for.
        here = torch.arange(self.context)
        far, open_far = closes & (bracket < here), (bracket >= 0) & (bracket < here)
        probability = logits.softmax(-1)[..., self.closing].sum(-1)
        values = {
            "loss": losses.mean().item(),
            "closing_loss": losses[far].mean().item(),
            "closing_probability.open": probability[open_far].mean().item(),
            "closing_probability.none": probability[bracket < 0].mean().item(),
            "matching_uniform": (1 / (here + 1.0)).expand_as(far)[far].mean().item(),
        }
        for layer, pattern in enumerate(network.patterns()):
            for head, score in enumerate(attention_to(pattern, bracket.clamp(min=0), far).tolist()):
                values[f"matching.{layer}.{head}"] = score
        return values
