"""Tensors computed from parameters and constants alone: chunks, casts, reparametrised weights, looked-up positions.

A use may receive such a tensor instead of the parameter. Its share is first taken with respect to what the use
received and then pulled back to the parameters it came from.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_gradtrace.capture.forward.replay import Surroundings, run
from lightning_gradtrace.capture.precision import coarsest
from lightning_gradtrace.capture.probing.draws import DrawSite
from lightning_gradtrace.capture.routes.layouts import Note
from lightning_gradtrace.capture.routes.rows import Route
from lightning_gradtrace.capture.shares import DenseShare, DiagonalShare, OuterShare, Share, SumShare, add_shares
from lightning_gradtrace.update.clipping import dense

# Numbers that a pull-back may write out at a time.
WORKSPACE = 2**24


@dataclass
class Operand:
    """A tensor among the arguments of a call that does not come from tracked parameters.

    Attributes:
        tensor: the tensor, detached.
        before: its shape before the view that made it, None if no view did.
        version: its version counter at the time of the call, to notice later changes in place.
        batched: whether it comes from the batch (`taint.py`); else it is a constant.
        route: whose its entries are (`routing.py`), None if it holds the samples in the ordinary way.
        draws: where the random numbers were drawn that it is made of, if it is made of nothing else of the samples.
        note: what its axes hold, None if nothing is known.
    """

    tensor: Tensor
    before: tuple[int, ...] | None
    version: int
    batched: bool
    route: Route | None = None
    draws: frozenset[DrawSite] = frozenset()
    note: Note | None = None

    @property
    def untouched(self) -> bool:
        """Whether it still holds what the call received."""
        return self.tensor._version == self.version


@dataclass(frozen=True, eq=False)
class Root:
    """A tracked parameter itself.

    Attributes:
        name: its name in ``named_parameters()``.
        tensor: the parameter.
    """

    name: str
    tensor: Tensor

    @property
    def precision(self) -> torch.dtype:
        """Dtype of its gradients."""
        return self.tensor.dtype

    @property
    def roots(self) -> dict[str, Root]:
        """The parameters this comes from, by name."""
        return {self.name: self}

    @property
    def draws(self) -> frozenset[DrawSite]:
        """No random numbers are in it."""
        return frozenset()

    def pull_back(self, share: Share) -> dict[Root, Share]:
        """Return the shares of the parameters for a share of this tensor."""
        return {self: share}


@dataclass(frozen=True, eq=False)
class Derived:
    """Output number ``output`` of a function of tracked tensors and constants.

    Attributes:
        function: the torch function.
        leaves: its flattened arguments, lineages in the place of tracked tensors, operands in that of constants.
        structure: pytree structure of the arguments.
        around: surroundings in which it ran.
        output: position among the outputs.
        tensor: the result, for its shape and strides.
        version: version counter of the result.
        roots: the parameters this comes from, by name.
        draws: where the random numbers were drawn that are in it.
        precision: coarsest dtype of the tensors that gradients of the parameters pass on their way through this.
    """

    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    structure: Any
    around: Surroundings
    output: int
    tensor: Tensor
    version: int = field(init=False)
    roots: dict[str, Root] = field(init=False)
    draws: frozenset[DrawSite] = field(init=False)
    precision: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", self.tensor._version)
        found: dict[str, Root] = {}
        for leaf in self.leaves:
            if isinstance(leaf, (Root, Derived)):
                found.update(leaf.roots)
        object.__setattr__(self, "roots", found)
        drawn = (leaf.draws for leaf in self.leaves if isinstance(leaf, (Root, Derived, Operand)))
        object.__setattr__(self, "draws", frozenset().union(*drawn))
        passed = [leaf.precision for leaf in self.leaves if isinstance(leaf, (Root, Derived))]
        object.__setattr__(self, "precision", coarsest([self.tensor.dtype, *passed]))

    def pull_back(self, share: Share) -> dict[Root, Share]:
        """Return the shares of the parameters for a share of this tensor.

        Transposes and blocks of rows of one matrix keep outer products as they are, an expansion over the samples is
        summed where it was expanded; everything else is pulled back sample by sample through the vector-Jacobian
        product of the derivation.
        """
        if isinstance(share, SumShare):
            pulled: dict[Root, list[Share]] = {}
            for part in share.parts:
                for root, found in self.pull_back(part).items():
                    pulled.setdefault(root, []).append(found)
            return {root: add_shares(found) for root, found in pulled.items()}
        source = self.leaves[0]
        if isinstance(share, DiagonalShare) and isinstance(source, (Root, Derived)):
            collapsed = _collapsed(self.function, share, source.tensor.shape)
            if collapsed is not None:
                return source.pull_back(collapsed)
        if len(self.roots) == 1 and isinstance(share, OuterShare):
            (root,) = self.roots.values()
            kept = _as_view_of(share, self.tensor, root.tensor)
            if kept is not None:
                return {root: kept}
        return self._pull_dense(share)

    def _pull_dense(self, share: Share) -> dict[Root, Share]:
        values = {name: root.tensor.detach().requires_grad_() for name, root in self.roots.items()}
        with torch.enable_grad():
            result = evaluate(self, values, {})

        def cotangents(samples: slice) -> list[Tensor]:
            return [share.dense(samples).to(result.dtype)]

        pulled = batched_vjp([result], list(values.values()), cotangents, share.n_samples)
        return {self.roots[name]: DenseShare(value) for name, value in zip(values, pulled, strict=True)}


Lineage = Root | Derived


def evaluate(lineage: Lineage, values: Mapping[str, Tensor], known: dict[int, list[Any]]) -> Tensor:
    """Compute a tracked tensor again.

    Args:
        lineage: the tensor.
        values: values of the parameters by name.
        known: outputs of the calls that were run before, by the identity of their arguments; added to.

    Returns:
        The tensor, for these values of the parameters.

    Raises:
        OverwrittenError: a constant that it depends on has changed since.
    """
    if isinstance(lineage, Root):
        return values[lineage.name]
    key = id(lineage.leaves)  # the outputs of one call share them
    if key not in known:
        leaves = []
        for leaf in lineage.leaves:
            if isinstance(leaf, (Root, Derived)):
                leaf = evaluate(leaf, values, known)
            elif isinstance(leaf, Operand):
                if not leaf.untouched:
                    raise OverwrittenError
                leaf = leaf.tensor
            leaves.append(leaf)
        known[key] = run(lineage.function, leaves, lineage.structure, lineage.around)
    return known[key][lineage.output]


class OverwrittenError(Exception):
    """A tensor that is needed for a second run was changed in place since the first."""


def batched_vjp(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Callable[[slice], Sequence[Tensor]],
    n_samples: int,
) -> list[Tensor]:
    """Pull many cotangents back through one graph, a bounded number at a time.

    Args:
        outputs: tensors that were computed from the inputs.
        inputs: leaves of the graph.
        cotangents: returns the cotangents of some samples for every output, shape (n, *shape of the output).
        n_samples: number of samples.

    Returns:
        For every input the vector-Jacobian products, shape (sample, *shape of the input).
    """
    largest = max(*(t.numel() for t in (*outputs, *inputs)), 1)
    rows = min(max(1, WORKSPACE // largest), n_samples)
    parts: list[list[Tensor]] = [[] for _ in inputs]
    vectorised = True
    for start in range(0, n_samples, rows):
        seeds = cotangents(slice(start, min(start + rows, n_samples)))
        pulled = None
        if vectorised:
            try:
                with quiet_vmap():
                    pulled = _vjp(outputs, inputs, seeds, batched=True)
            except RuntimeError:  # the backward of some function can't be vectorised
                vectorised = False
        if pulled is None:
            singles = [_vjp(outputs, inputs, [s[i] for s in seeds], batched=False) for i in range(len(seeds[0]))]
            pulled = [torch.stack(found) for found in zip(*singles, strict=True)]
        for part, found in zip(parts, pulled, strict=True):
            part.append(found)
    return [found[0] if len(found) == 1 else torch.cat(found) for found in parts]


def _vjp(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor], *, batched: bool
) -> list[Tensor]:
    found = torch.autograd.grad(outputs, inputs, seeds, retain_graph=True, allow_unused=True, is_grads_batched=batched)
    rows = (len(seeds[0]),) if batched else ()
    return [t.new_zeros((*rows, *t.shape)) if g is None else dense(g) for t, g in zip(inputs, found, strict=True)]


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Keep vmap's advice to itself: where torch has no batching rule the loop it runs instead is right, only slower."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
        yield


def _collapsed(function: Callable[..., Any], share: DiagonalShare, source: torch.Size) -> Share | None:
    """Return the share of a tensor for the share of its expansion over the samples; None for other functions."""
    if getattr(function, "__name__", "") not in ("expand", "expand_as", "broadcast_to"):
        return None
    lead = len(share.shape) - len(source)
    own = share.axis - lead
    if own >= 0 and source[own] != 1:
        return None
    values = share.values.unsqueeze(share.axis + 1) if own >= 0 else share.values  # (sample, *shape, 1 at the axis)
    sizes = list(share.shape)
    del sizes[share.axis]
    if own >= 0:
        sizes.insert(share.axis, 1)
    else:
        lead -= 1
    summed = [1 + i for i in range(len(sizes)) if i < lead or (source[i - lead] == 1 and sizes[i] != 1)]
    if summed:
        values = values.sum(summed, keepdim=True)
    return DenseShare(values.reshape(values.shape[0], *source))


def _as_view_of(share: OuterShare, view: Tensor, root: Tensor) -> OuterShare | None:
    """Return the share of a matrix for the share of its transpose or of a block of its rows, None for other views."""
    if root.dim() != 2 or view.dim() != 2 or view.untyped_storage().data_ptr() != root.untyped_storage().data_ptr():
        return None
    if (
        view.shape == root.T.shape
        and view.stride() == root.T.stride()
        and view.storage_offset() == root.storage_offset()
    ):
        return OuterShare(share.right, share.left)
    if view.stride() != root.stride() or view.shape[1] != root.shape[1] or root.stride(0) == 0:
        return None
    first, odd = divmod(int(view.storage_offset() - root.storage_offset()), root.stride(0))
    if odd:
        return None
    left = share.left.new_zeros((*share.left.shape[:2], root.shape[0]))
    left[:, :, first : first + view.shape[0]] = share.left
    return OuterShare(left, share.right)


def flatten_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """Flatten the arguments of a call into leaves and their pytree structure."""
    return tree_flatten((tuple(args), dict(kwargs)))
