"""Which tensors of a forward pass come from the batch, and which are constants of the model.

A tensor is *batched* if it is one of the batch's tensors or the result of a function with a batched argument; a
function in place makes its target batched. Three kinds of tensors come from the batch without such a function: those
with a ``grad_fn`` that no function of the pass explains (a custom ``torch.autograd.Function``), random numbers with
the number of samples among their axes (the noise of a generator; unless all samples are known to share it), and tensors
made from Python numbers once numbers of the batch have left torch. Everything else - buffers, ``arange``, masks - is a
constant.

Tensors are known by weak reference, so that nothing lives longer than it would, and an id that is given to another
tensor is noticed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from lightning_gradtrace.capture.forward.functions import Facts, tensors_among
from lightning_gradtrace.capture.forward.ways import Call, Ways
from lightning_gradtrace.capture.intake.batch import holds_only_tensors, tensors
from lightning_gradtrace.capture.probing.draws import DrawSite

_LEAVES_TORCH = frozenset(("numpy", "tolist", "item", "__array__"))
_NOWHERE = frozenset[DrawSite]()


class Taint:
    """Knows the batched tensors of one forward pass, and those that random numbers alone made.

    Args:
        batch: the batch; None if it is unknown, then every tensor counts as batched.
        n_samples: its number of samples.
        tracked: the tracked tensors, by identity; these are never batched.
        shared: where random numbers are drawn that all samples share; these are constants.
        note: is told of every draw that may be the samples' own.

    Attributes:
        ways: what was done with random numbers.
        new: the last target of a function in place that was a constant before; None if the last one was none.
        left_torch_function: whether results of functions came up that no function mode sees, as of TorchScript. What
            gradients pass is known of them where gradients are taken.
    """

    def __init__(
        self,
        batch: Any,
        n_samples: int | None,
        tracked: Container[int] = (),
        shared: Container[DrawSite] = (),
        note: Callable[[DrawSite, Tensor], None] | None = None,
    ) -> None:
        self._tracked = tracked
        self.n_samples = n_samples
        self._shared = shared
        self._note = note
        self._everything = batch is None
        self.new: Callable[[], Tensor | None] | None = None
        self.left_torch_function = False
        self._unseen: dict[int, Callable[[], Tensor | None]] = {}
        self._left_torch = batch is not None and not holds_only_tensors(batch)
        self._batched: dict[int, Callable[[], Tensor | None]] = {}
        self._drawn: dict[int, tuple[Callable[[], Tensor | None], frozenset[DrawSite]]] = {}
        self._constant: dict[int, Callable[[], Tensor | None]] = {}
        self.ways = Ways(n_samples, self.draws)
        for tensor in tensors(batch):
            self.add(tensor)

    def add(self, value: Any, draws: frozenset[DrawSite] = _NOWHERE) -> None:
        """Take the tensors of a value for batched from now on.

        Args:
            value: a tensor, or a list or tuple of such values.
            draws: where it was drawn, if nothing else of the samples is in it.
        """
        if isinstance(value, Tensor):
            self._batched[id(value)] = weakref.ref(value)
            self._mark(value, draws)
        elif isinstance(value, (tuple, list)):
            for item in value:
                self.add(item, draws)

    def written(self, target: Tensor, draws: frozenset[DrawSite] = _NOWHERE) -> None:
        """Take the target of a function in place for batched, and the tensor that it is a view of."""
        known = self._batched.get(id(target))
        self.new = None if known is not None and known() is target else weakref.ref(target)
        self.add(target, draws)
        if target._base is not None:
            self.add(target._base, draws)

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
        is_unexplained = known is None or known() is not tensor
        if is_unexplained and not isinstance(tensor.grad_fn, BackwardCFunction):
            self.left_torch_function = True
            self._unseen[id(tensor)] = weakref.ref(tensor)
        return is_unexplained

    def is_unseen(self, tensor: Tensor) -> bool:
        """Say whether a tensor is the result of a function that no function mode sees."""
        known = self._unseen.get(id(tensor))
        return known is not None and known() is tensor

    def draws(self, tensor: Tensor) -> frozenset[DrawSite]:
        """Return where the random numbers were drawn that a tensor is made of; nowhere if the batch is in it too."""
        known = self._drawn.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else _NOWHERE

    def before(self, known: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """Look at a call that comes, if random numbers may be among its arguments; a probe asks for no ways."""
        return self.ways.before(known.name, args, kwargs) if self._drawn and self._note is None else None

    def any(self, values: Iterable[Any]) -> bool:
        """Say whether any tensor among values, or in lists and tuples among them, is batched."""
        for value in values:
            if isinstance(value, Tensor):
                if self(value):
                    return True
            elif isinstance(value, (tuple, list)) and self.any(value):
                return True
        return False

    def after(self, known: Facts, args: tuple[Any, ...], kwargs: Mapping[str, Any], batched: bool, result: Any) -> bool:
        """Take note of the result of a function without tracked arguments.

        Args:
            known: facts about the function.
            args: its positional arguments.
            kwargs: its named arguments.
            batched: whether one of its arguments is batched.
            result: what it returned.

        Returns:
            Whether the result is batched.
        """
        if not known.in_place and not isinstance(result, (Tensor, tuple, list)):
            self._left_torch |= batched and known.name in _LEAVES_TORCH and not self.draws(args[0])
            return False
        made = args[0] if known.in_place and args else result
        has_room = isinstance(made, Tensor) and self.n_samples is not None and self.n_samples in made.shape
        if known.fresh or (has_room and known.draws and known.name.endswith("_like")):
            args, kwargs, batched = (), {}, False
        elif known.shape_only:
            args, kwargs = args[:1], {}
            batched = batched and self.any(args)
        if known.name in _LEAVES_TORCH and batched:
            self._left_torch |= not self.draws(args[0])
            return False
        draws = self._made_of((*args, *kwargs.values()), batched) if self._drawn else _NOWHERE
        if not batched and has_room and known.draws:
            site = DrawSite.here(known.name, made.shape, self.n_samples or 0)
            if self._note is not None:
                self._note(site, made)
            draws, batched = draws | {site}, site not in self._shared
        elif not batched and has_room and known.from_data:
            batched = self._left_torch
        if not batched:
            self._explain(result)
            self._mark(made, draws)
        else:
            if known.in_place and isinstance(made, Tensor):
                self.written(made, draws)
            self.add(result, draws)
        return batched

    def _made_of(self, values: Iterable[Any], batched: bool) -> frozenset[DrawSite]:
        """Return where the tensors among values were drawn, nowhere if anything else is batched."""
        found = [t for t in tensors_among(values) if not batched or self(t)]
        each = [self.draws(t) for t in found]
        return _NOWHERE if batched and not all(each) else _NOWHERE.union(*each)

    def _mark(self, value: Any, draws: frozenset[DrawSite]) -> None:
        if draws or self._drawn:
            for tensor in tensors_among((value,)):
                if draws:
                    self._drawn[id(tensor)] = weakref.ref(tensor), draws
                else:
                    self._drawn.pop(id(tensor), None)

    def _explain(self, result: Any) -> None:
        """Remember that a tensor with a ``grad_fn`` is a constant."""
        if isinstance(result, Tensor):
            if result.grad_fn is not None:
                self._constant[id(result)] = weakref.ref(result)
        elif isinstance(result, (tuple, list)):
            for item in result:
                self._explain(item)
