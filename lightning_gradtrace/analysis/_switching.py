"""Runs a model with some weights switched off inside the functions that use them, many variants in one pass.

Not by writing to the weights: a function mode sees each use of a weight W and calls it a second time with W0, in which
the weights in question are zero. What the use returns without them, plus whatever shall stand in place of their
contribution, goes on through the model. Under `torch.vmap` W0 is a whole stack of variants; everything before the
first use then runs once for all of them.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Instead = Callable[[int, Tensor], Tensor]


def switching(without: Mapping[int, Tensor], instead: Instead | None = None, *, keep: bool = False) -> Any:
    """Return a context in which weights are replaced where they are used.

    Args:
        without: W0 by the `id` of the weight.
        instead: called with the running number of each output of each use and what it is with W0, returns what to
            add; None to add nothing.
        keep: whether to fill `contributions`.

    Returns:
        A context manager with the list `contributions`: for each output of each use, what it was with W minus what
        it is with W0.
    """
    return _mode_class()(without, instead, keep)


@functools.cache
def _mode_class() -> Any:
    """Make the class on first use: analyses import torch only when they need it."""
    from torch import Tensor
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_flatten, tree_unflatten

    from lightning_gradtrace.capture.opening import opened

    class Switching(TorchFunctionMode):
        def __init__(self, without: Mapping[int, Tensor], instead: Instead | None, keep: bool) -> None:
            super().__init__()
            # Pairs hold their tensors, so that no id is given away while the mode lives.
            self._twin: dict[int, tuple[Any, Tensor]] = {key: (None, twin) for key, twin in without.items()}
            self._instead, self._keep, self._count = instead, keep, 0
            self.contributions: list[Tensor] = []

        def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            leaves, structure = tree_flatten((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if not any(id(leaf) in self._twin for leaf in tensors):
                return func(*args, **kwargs)
            if isinstance(func, types.FunctionType):
                with self:
                    return opened(func)(*args, **kwargs)
            result, form = tree_flatten(func(*args, **kwargs))
            if not any(isinstance(x, Tensor) for x in result):
                return tree_unflatten(result, form)  # a size, a type, a device
            leaves = [self._twin[id(x)][1] if isinstance(x, Tensor) and id(x) in self._twin else x for x in leaves]
            args_twin, kwargs_twin = tree_unflatten(leaves, structure)
            twin = tree_flatten(func(*args_twin, **kwargs_twin))[0]
            if all(id(x) in self._twin for x in tensors):
                # A view or a function of weights alone: no use yet, but its result stands for the weight from now on.
                self._twin |= {id(x): (x, y) for x, y in zip(result, twin, strict=True) if isinstance(x, Tensor)}
                return tree_unflatten(result, form)
            return tree_unflatten([self._used(x, y) for x, y in zip(result, twin, strict=True)], form)

        def _used(self, whole: Any, without: Any) -> Any:
            if not isinstance(whole, Tensor):
                return without
            if self._keep:
                self.contributions.append(whole - without)
            self._count += 1
            return without if self._instead is None else without + self._instead(self._count - 1, without)

    return Switching
