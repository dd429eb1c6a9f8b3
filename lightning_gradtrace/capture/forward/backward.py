"""Backward passes that a training step makes on its own, when the step is run again for the probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def beside_parameters(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Let a backward pass come to everything but parameters, as a sampler's that moves its samples by gradients.

    Args:
        function: `Tensor.backward` or `torch.autograd.backward`.
        args: its positional arguments.
        kwargs: its named arguments.
    """
    wanted = kwargs.get("inputs")
    found = leaves_of(args[0]) if wanted is None else tree_leaves(wanted)
    leaves = [leaf for leaf in found if not isinstance(leaf, nn.Parameter)]
    if leaves:
        function(*args, **{**kwargs, "inputs": leaves})


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
