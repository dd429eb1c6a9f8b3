"""Tensors computed from parameters alone: chunks, transposes, casts, reparametrised weights.

A use may receive such a tensor instead of the parameter. Its share is first taken with respect to what the use
received and then pulled back to the parameters it came from.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_gradtrace.capture.shares import DenseShare, OuterShare, Share


@dataclass(frozen=True, eq=False)
class Root:
    """A tracked parameter itself.

    Attributes:
        name: its name in ``named_parameters()``.
        tensor: the parameter.
    """

    name: str
    tensor: Tensor

    def roots(self) -> dict[str, Tensor]:
        """Return the parameters this comes from, by name."""
        return {self.name: self.tensor}

    def evaluate(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor for given values of the parameters."""
        return values[self.name]

    def pull_back(self, share: Share) -> dict[str, Share]:
        """Return the shares of the parameters for a share of this tensor."""
        return {self.name: share}


@dataclass(frozen=True, eq=False)
class Derived:
    """Output number ``output`` of a function of tracked tensors alone.

    Attributes:
        function: the torch function.
        leaves: its flattened arguments, lineages in the place of tracked tensors.
        structure: pytree structure of the arguments.
        output: position among the outputs, None for a function with one output.
        tensor: the result, for its shape and strides.
    """

    function: Callable[..., Any]
    leaves: tuple[Any, ...]
    structure: Any
    output: int | None
    tensor: Tensor

    def roots(self) -> dict[str, Tensor]:
        """Return the parameters this comes from, by name."""
        found: dict[str, Tensor] = {}
        for leaf in self.leaves:
            if isinstance(leaf, (Root, Derived)):
                found.update(leaf.roots())
        return found

    def evaluate(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor for given values of the parameters."""
        leaves = [leaf.evaluate(values) if isinstance(leaf, (Root, Derived)) else leaf for leaf in self.leaves]
        args, kwargs = tree_unflatten(leaves, self.structure)
        result = self.function(*args, **kwargs)
        return result if self.output is None else result[self.output]

    def pull_back(self, share: Share) -> dict[str, Share]:
        """Return the shares of the parameters for a share of this tensor.

        Transposes and blocks of rows of one matrix keep outer products as they are; everything else is pulled back
        sample by sample through the vector-Jacobian product of the derivation.
        """
        roots = self.roots()
        if len(roots) == 1 and isinstance(share, OuterShare):
            (name, root), *_ = roots.items()
            kept = _as_view_of(share, self.tensor, root)
            if kept is not None:
                return {name: kept}
        values = {name: tensor.detach() for name, tensor in roots.items()}
        target = self.tensor

        def pull(cotangent: Tensor) -> dict[str, Tensor]:
            vjp = torch.func.vjp(self.evaluate, values)[1]
            return vjp(cotangent.to(target.dtype))[0]

        with quiet_vmap():
            pulled = torch.func.vmap(pull)(share.dense())
        return {name: DenseShare(value) for name, value in pulled.items()}


Lineage = Root | Derived


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Keep vmap's advice to itself: where torch has no batching rule the loop it runs instead is right, only slower."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet implemented")
        yield


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
