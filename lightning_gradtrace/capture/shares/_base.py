"""How the per-sample gradients of a parameter are held until they are needed.

A share stands for ``g[i]``, the part of every sample ``i`` of a micro-batch in the gradient of one parameter
(docs/concepts.md, 2). It is kept in the form in which the backward pass left it - for a linear layer the two factors
of an outer product - and is written out only for as many samples at a time as the reader asks for.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

# Entries formed one by one take so many numbers of each factor at a time.
PICKED = 1 << 20


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which shares of parameters or factors of ``dtype`` are added up (float32 or wider)."""
    return torch.promote_types(dtype, torch.float32)


class Share(ABC):
    """Per-sample gradients of one use of one parameter of shape ``shape``, for ``n_samples`` samples."""

    shape: torch.Size

    @property
    @abstractmethod
    def n_samples(self) -> int:
        """Number of samples, the length of the leading axis of everything a share returns."""

    @property
    def is_held(self) -> bool:
        """Whether reading it computes from its tensors alone, so that several threads may do so at the same time."""
        return True

    @abstractmethod
    def dense(self, samples: slice = slice(None)) -> Tensor:
        """Write out ``g[samples]``, shape ``(n, *shape)``, in at least float32."""

    @abstractmethod
    def total(self) -> Tensor:
        """Sum over the samples without forming them, shape ``shape``, in at least float32."""

    def by_position(self, sample: int) -> Tensor:
        """Write out the parts of ``g[sample]`` that flow through each position of use, shape ``(position, *shape)``.

        They add up to ``g[sample]``; the positions of several uses follow each other (docs/concepts.md, 2).

        Args:
            sample: number of the sample.

        Raises:
            ValueError: the share was written out and has no factors to be taken apart.
        """
        raise ValueError(
            f"a `{type(self).__name__}` of shape {tuple(self.shape)} keeps no positions: it is summed over them. "
            "Linear uses and embeddings keep theirs"
        )

    def weighted_total(self, weights: Tensor) -> Tensor:
        """Sum over the samples with a weight for each, shape ``shape``; a few samples are formed at a time."""
        rows = max(1, 2**24 // max(self.shape.numel(), 1))
        out: Tensor | None = None
        for start in range(0, self.n_samples, rows):
            part = self.dense(slice(start, start + rows))
            part = torch.tensordot(weights[start : start + rows].to(part.dtype), part, 1)
            out = part if out is None else out + part
        assert out is not None  # a share has one sample or more
        return out


@dataclass
class OuterShare(Share):
    """``g[i] = left[i]^T right[i]``: a sum of outer products over positions, as linear uses leave it.

    Attributes:
        left: cotangents, shape (sample, position, out).
        right: inputs, shape (sample, position, in).
    """

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        self.shape = torch.Size((self.left.shape[-1], self.right.shape[-1]))

    @property
    @override
    def n_samples(self) -> int:
        return self.left.shape[0]

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """Dtype in which products are formed."""
        return accumulation_dtype(torch.promote_types(self.left.dtype, self.right.dtype))

    @override
    def dense(self, samples: slice = slice(None)) -> Tensor:
        left, right = self.left[samples].to(self.dtype), self.right[samples].to(self.dtype)
        return torch.bmm(left.transpose(1, 2), right)

    @override
    def total(self) -> Tensor:
        return self.left.flatten(0, 1).to(self.dtype).T @ self.right.flatten(0, 1).to(self.dtype)

    @override
    def weighted_total(self, weights: Tensor) -> Tensor:
        return OuterShare(self.left.to(self.dtype) * weights.to(self.dtype)[:, None, None], self.right).total()

    @override
    def by_position(self, sample: int) -> Tensor:
        left, right = self.left[sample].to(self.dtype), self.right[sample].to(self.dtype)
        return left[:, :, None] * right[:, None, :]

    def entries(self, samples: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> Tensor:
        """Form single entries, shape (m,).

        Args:
            samples: of which sample, ascending, shape (m,).
            rows: row of each entry.
            columns: column of each entry.
        """
        found = torch.empty(len(samples), dtype=self.dtype, device="cpu")
        edges = np.searchsorted(samples, np.arange(self.n_samples + 1))
        at_once = max(1, PICKED // max(1, self.left.shape[1]))
        for sample, (first, last) in enumerate(itertools.pairwise(edges)):
            for start in range(first, last, at_once):
                part = slice(start, min(last, start + at_once))
                left = self.left[sample].index_select(1, torch.from_numpy(rows[part])).to(self.dtype)
                right = self.right[sample].index_select(1, torch.from_numpy(columns[part])).to(self.dtype)
                found[part] = torch.from_numpy(np.einsum("tm,tm->m", left.numpy(), right.numpy()))
        return found

    def squared_norms(self) -> Tensor:
        """Squared Frobenius norm of every ``g[i]``, shape (sample,), from the Gram matrices of the factors.

        ``|g|^2 = sum over t, u of (d_t . d_u)(a_t . a_u)``: position^2 (out + in) multiplications instead of
        position * out * in, so the better choice for short sequences.
        """
        left, right = self.left.to(self.dtype), self.right.to(self.dtype)
        gram = torch.bmm(left, left.transpose(1, 2)).mul_(torch.bmm(right, right.transpose(1, 2)))
        return gram.sum((1, 2)).clamp_(min=0)

    @staticmethod
    def merge(shares: Sequence[OuterShare]) -> OuterShare:
        """Add several uses of one parameter: their positions are strung together, cross terms stay apart."""
        if len(shares) == 1:
            return shares[0]
        return OuterShare(torch.cat([s.left for s in shares], 1), torch.cat([s.right for s in shares], 1))


@dataclass
class RowShare(Share):
    """``g[i][rows[i, t]] += values[i, t]``: embeddings, where a sample touches only the rows it looks up.

    Attributes:
        rows: row numbers, shape (sample, position), int64.
        values: cotangents of the looked-up rows, shape (sample, position, features).
        n_rows: number of rows of the parameter.
    """

    rows: Tensor
    values: Tensor
    n_rows: int

    def __post_init__(self) -> None:
        self.shape = torch.Size((self.n_rows, self.values.shape[-1]))

    @property
    @override
    def n_samples(self) -> int:
        return self.rows.shape[0]

    @override
    def dense(self, samples: slice = slice(None)) -> Tensor:
        rows, values = self.rows[samples], self.values[samples]
        out = values.new_zeros((rows.shape[0], *self.shape), dtype=accumulation_dtype(values.dtype))
        return out.scatter_add_(1, rows.unsqueeze(-1).expand(values.shape), values.to(out.dtype))

    @override
    def total(self) -> Tensor:
        out = self.values.new_zeros(self.shape, dtype=accumulation_dtype(self.values.dtype))
        return out.index_add_(0, self.rows.flatten(), self.values.flatten(0, 1).to(out.dtype))

    @override
    def by_position(self, sample: int) -> Tensor:
        rows, values = self.rows[sample], self.values[sample]
        out = values.new_zeros((len(rows), *self.shape), dtype=accumulation_dtype(values.dtype))
        out[torch.arange(len(rows), device=rows.device), rows] = values.to(out.dtype)
        return out


@dataclass
class DenseShare(Share):
    """``g[i] = values[i]``, written out: biases, norms, and whatever the general rule computed.

    Attributes:
        values: shape (sample, *shape of the parameter).
    """

    values: Tensor

    def __post_init__(self) -> None:
        self.shape = self.values.shape[1:]

    @property
    @override
    def n_samples(self) -> int:
        return self.values.shape[0]

    @override
    def dense(self, samples: slice = slice(None)) -> Tensor:
        values = self.values[samples]
        return values.to(accumulation_dtype(values.dtype))

    @override
    def total(self) -> Tensor:
        return self.values.sum(0, dtype=accumulation_dtype(self.values.dtype))


@dataclass
class DiagonalShare(Share):
    """``g[i]`` is zero outside slice ``i`` of one axis: a tensor that holds one slice for each sample.

    Attributes:
        values: the slices, shape (sample, *shape without the axis).
        axis: the axis.
    """

    values: Tensor
    axis: int

    def __post_init__(self) -> None:
        self.shape = self.values.movedim(0, self.axis).shape

    @property
    @override
    def n_samples(self) -> int:
        return self.values.shape[0]

    @override
    def dense(self, samples: slice = slice(None)) -> Tensor:
        values = self.values[samples]
        out = values.new_zeros((len(values), *self.shape), dtype=accumulation_dtype(values.dtype))
        first = samples.indices(self.n_samples)[0]
        for row, value in enumerate(values):
            out[row].select(self.axis, first + row).copy_(value)
        return out

    @override
    def total(self) -> Tensor:
        return self.values.movedim(0, self.axis).to(accumulation_dtype(self.values.dtype))


@dataclass
class SumShare(Share):
    """Sum of shares of unlike form: a tied weight that is an embedding here and a linear layer there."""

    parts: list[Share]

    def __post_init__(self) -> None:
        self.shape = self.parts[0].shape

    @property
    @override
    def n_samples(self) -> int:
        return self.parts[0].n_samples

    @property
    @override
    def is_held(self) -> bool:
        return all(part.is_held for part in self.parts)

    @override
    def dense(self, samples: slice = slice(None)) -> Tensor:
        out = self.parts[0].dense(samples)
        for part in self.parts[1:]:
            out = out + part.dense(samples)
        return out

    @override
    def weighted_total(self, weights: Tensor) -> Tensor:
        out = self.parts[0].weighted_total(weights)
        for part in self.parts[1:]:
            out = out + part.weighted_total(weights)
        return out

    @override
    def total(self) -> Tensor:
        out = self.parts[0].total()
        for part in self.parts[1:]:
            out = out + part.total()
        return out

    @override
    def by_position(self, sample: int) -> Tensor:
        return torch.cat([part.by_position(sample) for part in self.parts])


def add_shares(shares: Sequence[Share]) -> Share:
    """Add the shares of all uses of one parameter in one micro-batch (docs/concepts.md, 2: tied or reused weights).

    Args:
        shares: one or more shares of the same parameter and the same samples.

    Returns:
        One share; outer products stay outer products, so that nothing is written out.
    """
    outer = [s for s in shares if isinstance(s, OuterShare)]
    rest: list[Share] = [s for s in shares if not isinstance(s, OuterShare)]
    parts = ([OuterShare.merge(outer)] if outer else []) + rest
    return parts[0] if len(parts) == 1 else SumShare(parts)
