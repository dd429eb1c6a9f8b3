"""What a sample holds, kept once per sample, so that analysis can show its text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from lightning_gradtrace.capture.intake.batch import token_ids

InputSource = Literal["auto"] | Callable[[Any], Any] | None


class InputFilter:
    """Picks the token ids of samples that were not seen before.

    Args:
        source: "auto" takes the batch's token ids, None nothing, or a callable(batch) -> (sample, position) array.
    """

    def __init__(self, source: InputSource) -> None:
        self._source = source
        self._seen: set[int] = set()

    def remember(self, ids: np.ndarray) -> None:
        """Take samples for seen, those of a trace that is resumed; int64, shape (n,)."""
        self._seen.update(ids.tolist())

    def new(
        self, batch: Any, ids: np.ndarray, batch_axis: int | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Return what is new in a batch.

        Args:
            batch: the batch.
            ids: its sample ids, shape (sample,).
            batch_axis: axis of the samples in its tensors, None if they are strung together.

        Returns:
            Ids, token ids of shape (sample, position) padded with -1, and lengths; None if there is nothing new.

        Raises:
            ValueError: the callable returned something else than whole numbers, one row per sample.
        """
        if self._source is None:
            return None
        new = [slot for slot, i in enumerate(ids.tolist()) if i not in self._seen]
        if not new:
            return None
        if callable(self._source):
            tokens = np.asarray(self._source(batch))
        else:
            found = None if batch_axis is None else token_ids(batch, len(ids), batch_axis)
            if found is None:
                return None
            tokens = found.cpu().numpy()
        if tokens.ndim != 2 or len(tokens) != len(ids) or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"GradTrace: inputs have shape {tokens.shape} and dtype {tokens.dtype}, expected whole numbers of "
                f"shape ({len(ids)}, position). Let `inputs=callable(batch)` return one row of token ids per sample, "
                "or give `inputs=None`."
            )
        tokens = tokens[new].astype(np.int32)
        self._seen.update(ids[new].tolist())
        return ids[new], tokens, (tokens >= 0).sum(1).astype(np.int32)


def vocabulary(vocab: Any) -> list[str] | None:
    """Return a vocabulary as a list of strings.

    Args:
        vocab: None, a list of strings, or an object with ``decode([id]) -> str`` and a length or ``vocab_size``.

    Raises:
        TypeError: it is none of these.
    """
    if vocab is None:
        return None
    if hasattr(vocab, "decode"):
        size = vocab.vocab_size if hasattr(vocab, "vocab_size") else len(vocab)
        return [str(vocab.decode([i])) for i in range(int(size))]
    if isinstance(vocab, (list, tuple)) and all(isinstance(word, str) for word in vocab):
        return list(vocab)
    raise TypeError(
        f"GradTrace: `vocab` is a `{type(vocab).__name__}`, expected None, a list of strings, or an object with "
        "decode([id]) and a length"
    )
