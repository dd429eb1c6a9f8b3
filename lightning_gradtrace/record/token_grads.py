"""TokenGrads: the largest shifts that single loss tokens caused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from typing_extensions import override

from lightning_gradtrace.capture.engines.loss_tokens import TokenChoice
from lightning_gradtrace.capture.micro_batch import MicroBatch, TokenPass
from lightning_gradtrace.capture.shares import Share
from lightning_gradtrace.record._base import ParameterInfo, Record, StepShifts, TokenShifts
from lightning_gradtrace.record.schedule import as_schedule
from lightning_gradtrace.record.search import Searcher, fill_with_zeros, largest
from lightning_gradtrace.store.schema import ArraySpec


def with_tokens(
    step: StepShifts, micro_batches: Sequence[MicroBatch], convert: Callable[[str, Share], Share]
) -> StepShifts:
    """Add to the shifts of a step those of its chosen loss tokens: the same scales, other shares.

    Args:
        step: the shifts.
        micro_batches: its micro-batches, with the shares of their loss tokens, if any were taken.
        convert: turns a share of a parameter, by name, into what the parameter's scale is for.

    Returns:
        ``step``.
    """
    if any(m.n_chosen is None for m in micro_batches):
        return step
    for slot in range(max(len(m.tokens) for m in micro_batches)):
        passes = [m.tokens[slot] if slot < len(m.tokens) else None for m in micro_batches]
        parameters = [
            replace(p, shares=[_part(p.info.name, *pair, convert) for pair in zip(p.shares, passes, strict=True)])
            for p in step.parameters
        ]
        none = [np.full(n, -1, np.int32) for n in step.n_samples]
        position = [e if one is None else one.position for one, e in zip(passes, none, strict=True)]
        token = [e if one is None else one.token for one, e in zip(passes, none, strict=True)]
        shifts = StepShifts(step.n_samples, parameters, step.number)
        step.tokens.append(TokenShifts(np.concatenate(position), np.concatenate(token), shifts))
    step.n_chosen = np.concatenate([m.n_chosen for m in micro_batches])
    return step


def _part(
    name: str, whole: Share | None, tokens: TokenPass | None, convert: Callable[[str, Share], Share]
) -> Share | None:
    """Return the share of one loss token of every sample, None where the whole loss has none."""
    share = None if whole is None or tokens is None else tokens.shares.get(name)
    return None if share is None else convert(name, share)


class TokenGrads(Record):
    """Keeps the ``k`` largest shifts of single loss tokens (docs/concepts.md, 2).

    For models whose loss is one cross-entropy over tokens, with ``engine="tape"``. The shifts of all loss tokens of an
    occurrence add up to the shift of the occurrence. Costs one backward pass for each chosen token of the sample that
    has most of them, at most ``slots`` per micro-batch.

    Arrays, in the group ``token_grads``: ``n_chosen`` (occurrence); ``position`` and ``token`` (occurrence,
    loss_token), -1 where a sample has fewer chosen tokens; ``index`` and ``shift`` (occurrence, loss_token, k).

    Args:
        tokens: token ids, or words of the vocabulary (then ``GradTrace(vocab=...)`` is needed); None for all.
        k: number of entries to keep per loss token.
        slots: largest number of tokens per sample. Of more, the first ones by position are kept; ``n_chosen`` says
            how many there were.
        by: choose the loss tokens that predict one of ``tokens`` ("target"), or those at whose position one of them
            is read ("input").
        schedule: at which steps to keep it: a `Schedule`, n for every n-th step, or a function of the step.

    Raises:
        ValueError: an argument is out of range.

    Example::

        >>> TokenGrads(["(", ")"], k=100)
        TokenGrads(tokens=['(', ')'], k=100, slots=8, by='target')
    """

    wants_tokens = True

    def __init__(
        self,
        tokens: Sequence[int] | Sequence[str] | None = None,
        k: int = 100,
        slots: int = 8,
        by: Literal["target", "input"] = "target",
        schedule: Any = None,
    ) -> None:
        self.tokens: list[int | str] | None = (
            None if tokens is None else [tokens] if isinstance(tokens, str) else list(tokens)
        )
        self.k = k
        self.slots = slots
        self.by = by
        self.schedule = as_schedule("TokenGrads", schedule)
        for name, value in (("k", k), ("slots", slots)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`TokenGrads({name}={value!r})`: expected a whole number, at least 1")
        if by not in ("target", "input"):
            raise ValueError(f"`TokenGrads(by={by!r})`: expected one of `target`, `input`")
        if self.tokens is not None and not self.tokens:
            raise ValueError("`TokenGrads(tokens=[])`: expected at least one token, or None for all")
        self._kept = 0
        self._n_entries = 0
        self._searcher: Searcher | None = None

    @property
    @override
    def group(self) -> str:
        return "token_grads"

    @override
    def choice(self, vocab: Sequence[str] | None) -> TokenChoice:
        """Return which loss tokens are wanted.

        Args:
            vocab: text of each token id.

        Raises:
            ValueError: a word is not in the vocabulary, or there is none.
        """
        if self.tokens is None:
            return TokenChoice(None, self.by, self.slots)
        words = [token for token in self.tokens if isinstance(token, str)]
        if words and vocab is None:
            raise ValueError(
                f"`TokenGrads(tokens={self.tokens!r})` names words, but there is no vocabulary. Give "
                "`GradTrace(vocab=...)`, or token ids."
            )
        ids: dict[str, list[int]] = {}
        for number, word in enumerate(vocab or ()):
            ids.setdefault(word, []).append(number)
        unknown = [word for word in words if word not in ids]
        if unknown:
            raise ValueError(
                f"`TokenGrads(tokens=...)`: {unknown} are not in the vocabulary of {len(vocab or ())} tokens. Words "
                "must be written as the vocabulary writes them, blanks included; or give token ids."
            )
        found = [i for token in self.tokens for i in (ids[token] if isinstance(token, str) else [int(token)])]
        return TokenChoice(tuple(found), self.by, self.slots)

    @override
    def specs(self, parameters: Sequence[ParameterInfo]) -> list[ArraySpec]:
        self._n_entries = sum(p.numel for p in parameters)
        self._kept = min(self.k, self._n_entries)
        self._searcher = Searcher(self._kept)
        index = "uint32" if self._n_entries < 2**32 - 1 else "uint64"
        one, two = ("occurrence", "loss_token"), ("occurrence", "loss_token", "k")
        token, tail = (self.slots,), (self.slots, self._kept)
        group = self.group
        return [
            ArraySpec(f"{group}/n_chosen", one[:1], (), "int32", "number of loss tokens that were chosen"),
            ArraySpec(f"{group}/position", one, token, "int32", "position of the loss token, -1 for none"),
            ArraySpec(f"{group}/token", one, token, "int32", "token that is predicted there, -1 for none"),
            ArraySpec(f"{group}/index", two, tail, index, "global entry number of a kept weight", codec="index"),
            ArraySpec(f"{group}/shift", two, tail, "float32", "shift of the weight by the loss token", codec="float"),
        ]

    @override
    def reduce(self, step: StepShifts, first_occurrence: int) -> dict[str, np.ndarray]:
        if self._searcher is None or step.n_chosen is None:
            raise RuntimeError("`TokenGrads.reduce` needs `specs` first, and the shares of loss tokens")
        n, slots, k = step.n_occurrences, self.slots, self._kept
        position, token = np.full((n, slots), -1, np.int32), np.full((n, slots), -1, np.int32)
        index = np.zeros((n, slots, k), np.uint32 if self._n_entries < 2**32 - 1 else np.uint64)
        shift = np.zeros((n, slots, k), np.float32)
        for slot, tokens in enumerate(step.tokens):
            position[:, slot], token[:, slot] = tokens.position, tokens.token
            found = self._searcher.search(tokens.step)
            edges = np.searchsorted(found.occurrence, np.arange(n + 1))
            for i in np.flatnonzero(tokens.position >= 0):
                part = slice(edges[i], edges[i + 1])
                keep = largest(found.shift[part], k)
                entry, value = found.entry[part][keep], found.shift[part][keep]
                index[i, slot], shift[i, slot] = fill_with_zeros(entry, value, k, self._n_entries)
        rows = {"n_chosen": step.n_chosen, "position": position, "token": token, "index": index, "shift": shift}
        return {f"{self.group}/{name}": array for name, array in rows.items()}
