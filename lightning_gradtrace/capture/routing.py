"""Follows rows of the batch through index functions: experts that get some of the tokens, packed sequences.

A row that was picked by an index keeps a *label*: its place among the rows (all axes but the last) of the tensor that
it was picked from. Labels are moved by the same functions as the rows - the index, the views, the concatenations - so
they are right for whatever index was drawn. Functions that treat rows apart keep labels; where rows meet a tensor that
holds the samples in the ordinary way, as in the sum over experts, the result is ordinary again. Once it is known where
the source holds the samples, a label tells the sample.

After any other function the labels are *lost*: such a tensor is attributed only if the permutation probe confirms that
it holds the samples in the ordinary way.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_gradtrace.capture.batch_axis import SampleAxis, candidates
from lightning_gradtrace.capture.functions import Facts, names_of

_PICKS = names_of("__getitem__ index_select masked_select gather take_along_dim repeat_interleave")
_MOVES = names_of(
    "view reshape flatten unflatten transpose permute movedim swapaxes squeeze unsqueeze expand T mT t select "
    "narrow split chunk unbind tensor_split repeat flip roll view_as split_with_sizes tile swapdims moveaxis "
    "__iter__"
)
_KEEPS = names_of(
    "clone contiguous detach to float double half bfloat16 type dropout layer_norm rms_norm type_as normalize "
    "requires_grad_ alpha_dropout feature_dropout scatter_ scatter_add_ index_add_ index_put_ index_copy_"
)
_ALONG = names_of("softmax log_softmax cumsum")
_REDUCES = names_of("sum mean amax amin norm logsumexp prod")
_ROWS = names_of("linear matmul __matmul__ mm grouped_mm _grouped_mm")
_WRITES = names_of(
    "__setitem__ index_add_ index_add scatter_ scatter scatter_add_ scatter_add index_put_ index_put "
    "index_copy_ index_copy scatter_reduce scatter_reduce_ masked_scatter masked_scatter_"
)
_IMAGES = names_of("conv1d conv2d conv3d max_pool1d max_pool2d avg_pool1d avg_pool2d adaptive_avg_pool2d")
_RECURRENT = names_of("lstm gru rnn_tanh rnn_relu")


@dataclass(frozen=True, eq=False)
class Route:
    """Where the rows of a tensor were picked from.

    Attributes:
        source: the tensor that they were picked from, detached; None if the labels are lost.
        labels: int64, shape of the tensor: number of the row of the source.
    """

    source: Tensor | None
    labels: Tensor | None

    def owners(self, axis: SampleAxis, n_samples: int) -> Rows:
        """Return the sample of every row, given the place of the samples in the source."""
        assert self.source is not None and self.labels is not None
        shape = _lead(self.source.shape)
        samples = torch.arange(n_samples, device=self.labels.device)
        by_label = axis.mark(samples, self.source.shape)
        by_label = (by_label if len(shape) == self.source.dim() else by_label.squeeze(-1)).expand(shape).flatten()
        labels = self.labels
        n_rows = labels.dim()
        while n_rows > 1 and _constant(labels, n_rows - 1):
            n_rows -= 1
            labels = labels.narrow(n_rows, 0, min(1, labels.shape[n_rows]))
        return Rows(by_label[labels], n_rows)


LOST = Route(None, None)


@dataclass(frozen=True, eq=False)
class Rows:
    """Place of the samples in a tensor whose rows belong to samples in any order and number.

    Attributes:
        owners: int64, the sample of every row, with as many axes as the tensor; of size 1 where it holds features.
        n_rows: number of leading axes that hold rows.
    """

    owners: Tensor
    n_rows: int
    factor: str = "rows"
    axis: int = 0

    def fits(self, shape: Sequence[int], n_samples: int) -> bool:
        """Say whether a tensor of this shape has these rows."""
        return tuple(shape[: self.n_rows]) == tuple(self.owners.shape[: self.n_rows])

    def samples_first(self, tensor: Tensor, n_samples: int) -> Tensor:
        """Return the rows of each sample, padded with zeros to the longest: shape (sample, row, ...)."""
        owners = self.owners.flatten()
        rows = tensor.flatten(0, self.n_rows - 1)
        counts = torch.bincount(owners, minlength=n_samples)
        order = owners.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        sorted_owners = owners[order]
        within = torch.arange(len(owners), device=owners.device) - starts[sorted_owners]
        longest = int(counts.max()) if len(owners) else 1
        out = rows.new_zeros((n_samples, longest, *rows.shape[1:]))
        out[sorted_owners, within] = rows[order]
        return out

    def mark(self, weights: Tensor, shape: Sequence[int]) -> Tensor:
        """Lay out one weight per sample so that it multiplies the rows of that sample."""
        owners = self.owners.reshape(self.owners.shape[: self.n_rows] + (1,) * (len(shape) - self.n_rows))
        return weights[..., owners]


class Routes:
    """Knows the picked rows of one forward pass.

    Args:
        n_samples: number of samples of the batch.
    """

    def __init__(self, n_samples: int | None) -> None:
        self._n_samples = n_samples
        self._known: dict[int, tuple[Callable[[], Tensor | None], Route]] = {}

    def __call__(self, tensor: Tensor) -> Route | None:
        """Return the route of a tensor, None if it was not picked."""
        known = self._known.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def after(
        self,
        known: Facts,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        is_batched: Callable[[Tensor], bool],
    ) -> None:
        """Take note of the result of a function with batched arguments."""
        if self._n_samples is None or self._n_samples == 1:
            return
        picks = known.name in _PICKS or known.name == "_pack_padded_sequence"
        if not picks and not self._known:
            return
        tensors = [t for t in _tensors((*args, *kwargs.values()))]
        routed = [t for t in tensors if self(t) is not None]
        try:
            # A table of parameters or constants has rows, not samples, however many there are.
            if picks and args and isinstance(args[0], Tensor) and is_batched(args[0]):
                if routed or self._picks_samples(known.name, args, kwargs):
                    self._set(result, self._pick(function, args, kwargs))
            elif routed:
                self._set(result, self._follow(known, function, args, kwargs, result, routed, is_batched))
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError):
            self._set(result, LOST)  # a call that labels can't follow is no reason to stop the user's forward pass

    def _picks_samples(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Say whether an index selects along an axis that could hold samples."""
        shape = args[0].shape
        among = {option.axis for option in candidates(shape, self._n_samples or 1)}
        if name == "_pack_padded_sequence":
            return True
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            axis, hit = 0, False
            n_used = sum(
                (i.dim() if i.dtype == torch.bool else 1) if isinstance(i, Tensor) else 0 if i is None else 1
                for i in index
                if i is not Ellipsis
            )
            for i in index:
                if i is Ellipsis:
                    axis += len(shape) - n_used
                elif isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8):
                    hit |= any(a in among for a in range(axis, axis + max(i.dim(), 1)))
                    axis += i.dim()
                elif isinstance(i, (Tensor, list)):
                    hit |= axis in among and not (isinstance(i, Tensor) and i.dim() == 0)
                    axis += 1
                elif i is not None and i is not True and i is not False:
                    axis += 1
            return hit
        if name == "masked_select":
            return True
        names = {"index_select": "dim", "gather": "dim", "take_along_dim": "dim", "repeat_interleave": "dim"}
        position = 1 if name in ("index_select", "gather") else 2
        dim = args[position] if len(args) > position else kwargs.get(names[name])
        return dim is None or (dim % max(len(shape), 1)) in among

    def _pick(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        route = self(args[0])
        if route is LOST:
            return LOST
        source = route.source if route is not None else args[0].detach()
        labels = route.labels if route is not None else _fresh(args[0])
        assert source is not None
        moved = function(labels, *args[1:], **kwargs)
        if isinstance(moved, tuple):
            return [Route(source, moved[0]), None]
        return _unless_ordinary(Route(source, moved))

    def _follow(
        self,
        known: Facts,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        routed: list[Tensor],
        is_batched: Callable[[Tensor], bool],
    ) -> Any:
        """Return the route of the result, or one for each of several results."""
        name, first = known.name.removeprefix("_VF."), args[0] if args else None
        if name in _WRITES:
            return self(first) if isinstance(first, Tensor) else None
        route = self(routed[0])
        assert route is not None
        labels = route.labels
        if name in ("cat", "concat", "stack"):
            parts = [self(t) for t in _tensors((first if first is not None else kwargs["tensors"],))]
            if any(part is None or part.source is not route.source or part is LOST for part in parts):
                return LOST
            return _unless_ordinary(Route(route.source, function([p.labels for p in parts if p], *args[1:], **kwargs)))
        if known.pointwise or name in ("where", "masked_fill", "masked_fill_", "clamp"):
            ordinary = [t for t in _tensors((*args, *kwargs.values())) if self(t) is None and is_batched(t)]
            if any(candidates(t.shape, self._n_samples or 1) for t in ordinary):
                return None
            if labels is None or not isinstance(result, Tensor):
                return LOST
            return Route(route.source, labels.expand(result.shape))
        if labels is None or first is not routed[0]:
            return LOST
        if name in _MOVES:
            moved = function(labels, *args[1:], **kwargs)
            if isinstance(moved, (tuple, list)):
                return [_unless_ordinary(Route(route.source, part)) for part in moved]
            return _unless_ordinary(Route(route.source, moved))
        return self._through(name, route.source, labels, args, kwargs, result)

    def _through(
        self,
        name: str,
        source: Tensor | None,
        labels: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
    ) -> Any:
        """Return the route after a function that treats rows apart."""
        if name in _KEEPS and isinstance(result, Tensor) and result.shape == labels.shape:
            return Route(source, labels)
        last = labels.dim() - 1
        if name in _ALONG | _REDUCES:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            dims = [dim] if isinstance(dim, int) else list(dim) if isinstance(dim, (tuple, list)) else []
            if dims and all(isinstance(d, int) and _constant(labels, d % labels.dim()) for d in dims):
                if name in _ALONG:
                    return Route(source, labels)
                keep = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
                return _unless_ordinary(Route(source, labels.amin(dims, keepdim=bool(keep))))
        if name in _ROWS and labels.dim() > 1 and _constant(labels, last) and result.shape[:-1] == labels.shape[:-1]:
            return Route(source, labels[..., :1].expand(result.shape))
        if name == "embedding" and result.shape[:-1] == labels.shape:
            return Route(source, labels.unsqueeze(-1).expand(result.shape))
        if name in _IMAGES and all(_constant(labels, axis) for axis in range(1, labels.dim())):
            flat = labels.flatten(1)[:, :1].reshape(-1, *[1] * (result.dim() - 1))
            return Route(source, flat.expand(result.shape))
        sizes = args[1] if len(args) > 1 else None
        if name in _RECURRENT and isinstance(sizes, Tensor) and sizes.dim() == 1 and _constant(labels, last):
            hidden = labels[: int(sizes[0]), 0][None, :, None]
            rows = labels[:, :1]
            return [Route(source, (rows if i == 0 else hidden).expand(t.shape)) for i, t in enumerate(result)]
        if name == "_pad_packed_sequence":
            padded = torch._VF._pad_packed_sequence(labels, args[1], args[2], -1, args[4])[0]
            first = padded[:, :1] if args[2] else padded[:1]  # what is padded belongs to its sequence all the same
            return [Route(source, torch.where(padded == -1, first.expand_as(padded), padded)), None]
        return LOST

    def _set(self, result: Any, routes: Any) -> None:
        pairs = (
            zip(result, routes, strict=False)
            if isinstance(result, (tuple, list)) and isinstance(routes, list)
            else [(result, routes)]
        )
        for tensor, route in pairs:
            if isinstance(tensor, (tuple, list)):
                for item in tensor:
                    self._set(item, route)
            elif isinstance(tensor, Tensor):
                if route is None:
                    self._known.pop(id(tensor), None)
                else:
                    self._known[id(tensor)] = (weakref.ref(tensor), route)


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found


def _lead(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape[:-1]) if len(shape) > 1 else tuple(shape)


def _fresh(tensor: Tensor) -> Tensor:
    """Number the rows of a tensor."""
    shape = _lead(tensor.shape)
    labels = torch.arange(math.prod(shape), device=tensor.device).view(shape)
    return labels.unsqueeze(-1).expand(tensor.shape) if len(shape) < tensor.dim() else labels


def _constant(labels: Tensor, axis: int) -> bool:
    """Say whether labels do not change along an axis."""
    if labels.shape[axis] <= 1 or labels.stride(axis) == 0:
        return True
    return bool((labels == labels.narrow(axis, 0, 1)).all())


def _unless_ordinary(route: Route) -> Route | None:
    """Drop the route of rows that are back where they came from."""
    assert route.source is not None and route.labels is not None
    if route.labels.shape == route.source.shape and torch.equal(route.labels, _fresh(route.source)):
        return None
    return route
