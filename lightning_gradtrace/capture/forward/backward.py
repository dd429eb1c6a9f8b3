"""Backward passes that a training step makes on its own, when the step is run again for the probe."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_gradtrace.capture.forward.functions import tensors_among


class OwnBackward:
    """Lets backward passes come to what the step has made, as a sampler's that moves its samples by gradients.

    They come to no parameters, and to nothing else that was there before.
    """

    def __init__(self) -> None:
        self._made: dict[int, Callable[[], Tensor | None]] = {}
        self._before: dict[int, tuple[Tensor, Tensor | None]] = {}

    def noted(self, args: tuple[Any, ...], result: Any) -> Any:
        """Take note of the result of a function, or of what it was called on if it returns nothing, and return it."""
        for tensor in tensors_among(args[:1] if result is None else (result,)):
            self._made[id(tensor)] = weakref.ref(tensor)
        return result

    def _is_own(self, leaf: Tensor) -> bool:
        made = self._made.get(id(leaf))
        return made is not None and made() is leaf and not isinstance(leaf, nn.Parameter)

    def __call__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Make a backward pass.

        Args:
            function: `Tensor.backward` or `torch.autograd.backward`.
            args: its positional arguments.
            kwargs: its named arguments.
        """
        wanted = kwargs.get("inputs")
        found = leaves_of(args[0]) if wanted is None else tree_leaves(wanted)
        leaves = [leaf for leaf in found if self._is_own(leaf)]
        for leaf in leaves:
            if id(leaf) not in self._before:
                self._before[id(leaf)] = leaf, leaf.grad
                leaf.grad = None if leaf.grad is None else leaf.grad.clone()
        if leaves:
            function(*args, **{**kwargs, "inputs": leaves})

    def forget(self) -> None:
        """Give tensors that were there before, as the batch, the gradients back that they had."""
        for leaf, gradient in self._before.values():
            leaf.grad = gradient
        self._before.clear()


def leaves_of(results: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Return the leaves of the graph of some tensors, in which a backward pass would accumulate gradients."""
    pending = [result.grad_fn for result in tree_leaves(results) if isinstance(result, Tensor)]
    met: set[Any] = set()
    leaves = []
    while pending:
        node = pending.pop()
        if node is None or node in met:
            continue
        met.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves.append(variable)
        pending += [before for before, _ in node.next_functions]
    return leaves
