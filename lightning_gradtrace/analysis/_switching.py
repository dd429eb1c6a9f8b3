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
        keep: whether to fill `contributions`, and to go on with what the use returns with W.

    Returns:
        A context manager with the list `contributions`: for each output of each use, what it was with W minus what
        it is with W0. All of them are of the whole model: nothing is switched off before a later use.
    """
    return _mode_class()(without, instead, keep)


@functools.cache
def _mode_class() -> Any:
    """Make the class on first use: analyses import torch only when they need it."""
    from torch import Tensor
    from torch.overrides import TorchFunctionMode
    from torch.utils._pytree import tree_flatten, tree_unflatten

    from lightning_gradtrace.capture.forward.modes import opened

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
            others = [self._twin[id(x)][1] if isinstance(x, Tensor) and id(x) in self._twin else x for x in leaves]
            if all(id(x) in self._twin for x in tensors):
                result, form = tree_flatten(func(*args, **kwargs))
                if any(isinstance(x, Tensor) for x in result):  # no size, type or device
                    # A view or a function of weights alone: no use yet, but it stands for the weight from now on.
                    twin = tree_flatten(_call(func, others, structure))[0]
                    self._twin |= {id(x): (x, y) for x, y in zip(result, twin, strict=True) if isinstance(x, Tensor)}
                return tree_unflatten(result, form)
            whole: list[Any] = []
            if self._keep:
                # On copies: the function may write into an argument, and is called once more.
                copies = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
                whole = tree_flatten(_call(func, copies, structure))[0]
            result, form = tree_flatten(_call(func, others, structure))
            given = {id(x) for x in others}
            return tree_unflatten([self._used(i, x, whole, given) for i, x in enumerate(result)], form)

        def _used(self, number: int, without: Any, whole: list[Any], given: set[int]) -> Any:
            if not isinstance(without, Tensor):
                return without
            if whole:
                added = whole[number] - without
                self.contributions.append(added)
            elif self._instead is not None:
                self._count += 1
                added = self._instead(self._count - 1, without)
            else:
                return without
            # A function that wrote into its argument: who holds that argument must see the addition too.
            if id(without) in given:
                return without.add_(added)
            return whole[number] if whole else without + added

    def _call(func: Any, leaves: list[Any], structure: Any) -> Any:
        args, kwargs = tree_unflatten(leaves, structure)
        return func(*args, **kwargs)

    return Switching
