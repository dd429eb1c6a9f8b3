"""Which tensors of a forward pass come from the batch, and which are constants of the model.

A tensor is *batched* if it is one of the batch's tensors or the result of a function with a batched argument; a
function in place makes its target batched. Three kinds of tensors come from the batch without such a function: those
with a ``grad_fn`` that no function of the pass explains (a custom ``torch.autograd.Function``), random numbers with
the number of samples among their axes (the noise of a generator; where it meets a parameter of its own shape, entry by
entry, it is noise of the weights and a constant), and tensors made from Python numbers once numbers of
the batch have left torch. Everything else - buffers, ``arange``, masks - is a constant.

Tensors are known by weak reference, so that nothing lives longer than it would, and an id that is given to another
tensor is noticed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable
from typing import Any

from torch import Tensor

from lightning_gradtrace.capture.batch import holds_only_tensors, tensors
from lightning_gradtrace.capture.functions import Facts

_LEAVES_TORCH = frozenset(("numpy", "tolist", "item", "__array__"))


class Taint:
    """Knows the batched tensors of one forward pass.

    Args:
        batch: the batch; None if it is unknown, then every tensor counts as batched.
        n_samples: its number of samples.
        tracked: the tracked tensors, by identity; these are never batched.
    """

    def __init__(self, batch: Any, n_samples: int | None, tracked: Container[int] = ()) -> None:
        self._tracked = tracked
        self.n_samples = n_samples
        self._everything = batch is None
        self._left_torch = batch is not None and not holds_only_tensors(batch)
        self._batched: dict[int, Callable[[], Tensor | None]] = {}
        self._noise: dict[int, Callable[[], Tensor | None]] = {}
        self._constant: dict[int, Callable[[], Tensor | None]] = {}
        for tensor in tensors(batch):
            self.add(tensor)

    def add(self, value: Any) -> None:
        """Take the tensors of a value for batched from now on."""
        if isinstance(value, Tensor):
            self._batched[id(value)] = weakref.ref(value)
        elif isinstance(value, (tuple, list)):
            for item in value:
                self.add(item)

    def written(self, target: Tensor) -> None:
        """Take the target of a function in place for batched, and the tensor that it is a view of."""
        self.add(target)
        if target._base is not None:
            self.add(target._base)

    def __call__(self, tensor: Tensor) -> bool:
        """Say whether a tensor is batched."""
        if id(tensor) in self._tracked:
            return False
        if self._everything:
            return True
        known = self._batched.get(id(tensor))
        if known is not None and known() is tensor:
            return True
        if tensor.grad_fn is None:
            return False
        known = self._constant.get(id(tensor))
        return known is None or known() is not tensor

    def is_noise(self, tensor: Tensor) -> bool:
        """Say whether a tensor counts as batched only because what was drawn for it has as many entries on an axis."""
        known = self._noise.get(id(tensor))
        return known is not None and known() is tensor

    def _is_made_of_noise(self, args: Iterable[Any]) -> bool:
        batched = [t for t in tensors(args) if self(t)]
        return bool(batched) and all(map(self.is_noise, batched))

    def any(self, values: Iterable[Any]) -> bool:
        """Say whether any tensor among values, or in lists and tuples among them, is batched."""
        for value in values:
            if isinstance(value, Tensor):
                if self(value):
                    return True
            elif isinstance(value, (tuple, list)) and self.any(value):
                return True
        return False

    def after(self, known: Facts, args: tuple[Any, ...], batched: bool, result: Any) -> bool:
        """Take note of the result of a function without tracked arguments.

        Args:
            known: facts about the function.
            args: its positional arguments.
            batched: whether one of its arguments is batched.
            result: what it returned.

        Returns:
            Whether the result is batched.
        """
        if not known.in_place and not isinstance(result, (Tensor, tuple, list)):
            self._left_torch |= batched and known.name in _LEAVES_TORCH
            return False
        if known.fresh:
            batched = False
        elif batched and known.shape_only:
            batched = self.any(args[:1])
        if known.name in _LEAVES_TORCH and batched:
            self._left_torch = True
            return False
        noise = batched and bool(self._noise) and self._is_made_of_noise(args)
        if not batched and (known.draws or (known.from_data and self._left_torch)):
            made = args[0] if known.in_place and args else result
            batched = isinstance(made, Tensor) and self.n_samples in made.shape
            noise = batched and known.draws
        if noise:
            made = tensors(args[:1] if known.in_place else result)
            self._noise |= {id(t): weakref.ref(t) for t in made}
        if batched:
            if known.in_place and args and isinstance(args[0], Tensor):
                self.written(args[0])
            self.add(result)
        else:
            self._explain(result)
        return batched

    def _explain(self, result: Any) -> None:
        """Remember that a tensor with a ``grad_fn`` is a constant."""
        if isinstance(result, Tensor):
            if result.grad_fn is not None:
                self._constant[id(result)] = weakref.ref(result)
        elif isinstance(result, (tuple, list)):
            for item in result:
                self._explain(item)
