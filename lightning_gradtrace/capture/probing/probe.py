"""Run a model on a batch and on the same batch permuted, leaving no trace of it in the model.

The two runs are made as in training, so that they call what the step called, without gradients, or with them where the
step takes gradients of its own or calls functions that no function mode sees. Along the right axis, what a use receives
in the second run is what it received in the first, permuted (docs/concepts.md, 2).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradtrace.capture.forward.influence import InfluenceTape
from lightning_gradtrace.capture.forward.tape import Tape
from lightning_gradtrace.capture.forward.use import Use
from lightning_gradtrace.capture.intake.batch import copied, sample_axis_of, tensors
from lightning_gradtrace.capture.intake.permuting import has_lists, own_part, permute_samples
from lightning_gradtrace.capture.intake.strung import Strung
from lightning_gradtrace.capture.placing.batch_axis import SampleAxis
from lightning_gradtrace.capture.placing.settling import count_unexplained
from lightning_gradtrace.capture.probing.draws import EVERYWHERE, Draws, DrawSite, arrange
from lightning_gradtrace.capture.probing.memory import Memory
from lightning_gradtrace.capture.probing.random_state import RandomState
from lightning_gradtrace.capture.probing.sharing import is_shared
from lightning_gradtrace.capture.probing.snapshot import undisturbed
from lightning_gradtrace.capture.sharded import is_spread


def permutation(n_samples: int) -> Tensor:
    """Return a fixed order of the samples, for the permuted batch; no global seed is touched.

    It does not commute with a shift or a reversal: a model that shifts or reverses the samples is told from one that
    leaves them where they are. Of two samples the second is taken twice, because all orders of two commute. Of more
    than three, no two stay side by side and no first ones stay the first: rows of one sample, or of a group of samples,
    that happen to be as many as the samples are told from one row of each. Of more than four, every one changes its
    place.
    """
    if n_samples < 3:
        return torch.full((n_samples,), n_samples - 1, device="cpu")
    generator = torch.Generator().manual_seed(0)
    order = torch.arange(n_samples, device="cpu")
    while not _is_irregular(order):
        order = torch.randperm(n_samples, generator=generator, device="cpu")
    return order


def _is_irregular(order: Tensor) -> bool:
    n_samples, identity = len(order), torch.arange(len(order), device="cpu")
    if any(torch.equal(one[order], order[one]) for one in (identity.flip(0), identity.roll(1))):
        return False
    if n_samples > 3 and bool((order.diff() == 1).any() | (order.cummax(0).values == identity)[:-1].any()):
        return False
    return n_samples < 5 or not bool((order == identity).any())


def in_order(n_samples: int) -> Tensor:
    """Return an order in which every other sample is taken twice, and none comes before one that it came after."""
    numbers = torch.arange(n_samples, device="cpu")
    return numbers - numbers % 2


def stir(module: nn.Module) -> None:
    """Give a module weights that are a little other; always the same, and in other places in memory.

    They are put back by who knows where they were (`snapshot.py`).
    """
    generator = np.random.default_rng(0)  # torch's draws are those of the model
    for parameter in module.parameters():
        if parameter.is_floating_point() and parameter.numel():
            noise = torch.from_numpy(generator.standard_normal(tuple(parameter.shape), np.float32)).to(parameter)
            size = parameter.detach().square().mean().sqrt()
            parameter.data = parameter.data + STIRRING * noise * torch.where(size > TINY, size, 1.0)


SWAP = torch.tensor([1, 0], device="cpu")
"""Two samples in the other order. It commutes with every shift and reversal."""
STIRRING = 0.03
"""How large what is added to weights is, compared with them; weights that are all tiny count as ones."""
TINY = 3e-3
T = TypeVar("T")
AnyTape = TypeVar("AnyTape", bound=Tape)


@dataclass(frozen=True)
class PermutationProbe:
    """Runs a model on a batch and on the batch permuted, when asked.

    Attributes:
        module: the module whose modes, buffers and other tensors are restored afterwards.
        parameters: tracked parameters by name.
        run: runs the model's training forward on a batch.
        batch: the batch.
        n_samples: number of samples in it.
        batch_axis: axis of the samples in the batch's tensors.
        state: random states when the real forward pass began; None for the present ones.
        memory: what the module remembered then; None for what it remembers now.
        shared: where random numbers are drawn that count as shared by all samples.
        fixed: where they are known to be; these stay as they are when the samples are permuted.
        training: run as in training, else in evaluation mode.
        stirred: run on weights that are a little other than the model's; in training two samples are swapped then.
        graded: run with gradients, because what gradients pass is not known without.
        trials: how many runs may be spent on the places of samples in random numbers.
    """

    module: nn.Module
    parameters: Mapping[str, Tensor]
    run: Callable[[Any], Any]
    batch: Any
    n_samples: int
    batch_axis: int
    state: RandomState | None = None
    memory: Memory | None = None
    shared: Container[DrawSite] = ()
    fixed: Collection[DrawSite] = ()
    training: bool = True
    stirred: bool = False
    graded: bool = False
    trials: int = 32

    @functools.cached_property
    def _strung(self) -> Strung:
        return Strung(self.batch, self.n_samples)

    def coincides(self) -> bool:
        """Say whether something else than samples is as numerous: positions, features, rows of a table.

        Functions that no function mode sees may have moved them, so that sizes mislead.
        """
        if self.graded:
            return True
        sizes = {size for tensor in (*self.module.parameters(), *self.module.buffers()) for size in tensor.shape}
        for tensor in tensors(self.batch):
            samples = None if tensor in self._strung else sample_axis_of(tensor, self.n_samples, self.batch_axis)
            sizes |= {size for axis, size in enumerate(tensor.shape) if axis != samples}
        return self.n_samples in sizes

    def __call__(self) -> tuple[list[Use], list[Use], Tensor]:
        """Record the uses of both runs.

        Returns:
            Uses of the run on the batch, uses of the run on the permuted batch, and the order of its samples.
        """
        if self.stirred and self.training and self.n_samples == 2:
            return self._look(SWAP)
        try:
            return self._look(permutation(self.n_samples))
        except Exception:
            if is_spread(self.module):
                raise
        return self._look(in_order(self.n_samples))  # a step may ask that longer ones come first

    def _look(self, order: Tensor) -> tuple[list[Use], list[Use], Tensor]:
        with self._runs(Tape) as run:
            draws = Draws()
            first = run(self.batch, draws)
            return first.uses, self._arranged(run, first, draws, order)[1].uses, order

    def swapped(self) -> tuple[list[Use], Tensor]:
        """Record the uses of a run on a batch of two samples in the other order, and return that order, too."""
        return self._look(SWAP)[1:]

    def otherwise(self) -> PermutationProbe | None:
        """Return a probe that may tell what this one leaves open, None after the last.

        On other weights layers that begin with zeros let something through, and nothing is random in evaluation mode.
        """
        if is_spread(self.module) or not self.training:
            return None
        return replace(self, stirred=True, training=not self.stirred)

    def sharing(self, sites: Container[DrawSite], fixed: Collection[DrawSite] = ()) -> PermutationProbe:
        """Return a probe for random numbers that all samples share, see `Probe`."""
        return replace(self, shared=sites, fixed=fixed)

    def influence(self, sites: Collection[DrawSite]) -> dict[DrawSite, bool | None]:
        """Say of random numbers whether all samples share them, None for those without an influence.

        Raises:
            UnattributableError: all samples share a draw in one place and not in another.
        """
        probe = replace(self, shared=EVERYWHERE)
        order = permutation(self.n_samples)
        found = {}
        with probe._runs(InfluenceTape) as run:
            draws = Draws()
            first = run(self.batch, draws)
            places, moved = probe._arranged(run, first, draws, order)
            for site in sites:
                numbers = draws.sites.get(site, ())
                others = {i: place for i, place in places.items() if i not in numbers}
                fixed = run(probe._permuted(order), Draws(draws.made, others, order))
                found[site] = is_shared(site, first, fixed, moved, order) if numbers else None
        return found

    def _permuted(self, order: Tensor, with_lists: bool = True) -> Any:
        return permute_samples(self.batch, order, self.n_samples, self.batch_axis, with_lists=with_lists)

    def _arranged(
        self, run: Callable[..., AnyTape], first: Tape, draws: Draws, order: Tensor
    ) -> tuple[dict[int, SampleAxis], AnyTape]:
        """Return where the samples are in the draws of a run, and the permuted run that shows it."""
        fixed = frozenset(number for site in self.fixed for number in draws.sites.get(site, ()))
        batches = [self._permuted(order)]
        if self.trials and has_lists(self.batch, self.n_samples):  # a list may hold something else, such as a size
            batches.append(self._permuted(order, with_lists=False))

        def count(found: AnyTape) -> int:
            return count_unexplained(first.uses, found.uses, order)

        tried: list[tuple[dict[int, SampleAxis], AnyTape, int, Any]] = []
        for permuted in batches:

            def play(places: Mapping[int, SampleAxis], permuted: Any = permuted) -> AnyTape:
                return run(permuted, Draws(draws.made, places, order))

            try:
                tried.append((*arrange(draws.made, self.n_samples, play, count, self.trials, fixed), permuted))
            except Exception:
                if permuted is batches[-1] and not tried:
                    raise
            if tried and not tried[-1][2]:
                break
        places, second, unexplained, permuted = min(tried, key=lambda one: one[2])
        for with_buffers in (False, True):  # hidden states may have been kept from the batch before
            if self.trials and unexplained:
                other = run(permuted, Draws(draws.made, places, order), order, with_buffers)
                if (found := count(other)) < unexplained:
                    second, unexplained = other, found
        return places, second

    def own_axis(self, tensor: Tensor) -> int | None:
        """Return the axis of the samples in a tensor of the batch itself, None for all others."""
        for own in tensors(self.batch):
            if own.shape == tensor.shape and own.data_ptr() == tensor.data_ptr():
                return None if own in self._strung else sample_axis_of(own, self.n_samples, self.batch_axis)
        return None

    def again(self) -> list[Use]:
        """Record the uses of a second run on the batch, after a first one that leaves its state and random numbers."""

        def run(with_gradients: bool) -> list[Use]:
            self._taped(Tape, self.batch, with_gradients=with_gradients)
            return self._taped(Tape, self.batch, with_gradients=with_gradients).uses

        with undisturbed(self.module):
            return self._with_gradients_if_needed(run)

    @contextmanager
    def _runs(self, kind: type[AnyTape]) -> Iterator[Callable[..., AnyTape]]:
        """Yield what runs the model on a batch under a tape; all runs begin alike, but for how memory is recalled."""
        memory = self.memory or Memory(self.module)
        with undisturbed(self.module, self.training) as before:

            def once(data: Any, draws: Draws, recalled: Sequence[Any], with_gradients: bool) -> AnyTape:
                draws.made.clear()
                draws.sites.clear()
                try:
                    memory.recall(*recalled)
                    if self.stirred:
                        stir(self.module)
                    if self.state is not None:
                        self.state.restore()
                    with draws:
                        return self._taped(kind, data, draws, with_gradients=with_gradients)
                finally:
                    before.restore()

            def run(data: Any, draws: Draws, *recalled: Any) -> AnyTape:
                nonlocal memory
                try:
                    return self._with_gradients_if_needed(functools.partial(once, data, draws, recalled))
                except Exception:  # what is remembered may not fit what is no part of it
                    if memory is not self.memory or is_spread(self.module):
                        raise
                    memory = Memory(self.module)
                return self._with_gradients_if_needed(functools.partial(once, data, draws, recalled))

            yield run

    def _with_gradients_if_needed(self, run: Callable[[bool], T]) -> T:
        if self.graded and not is_spread(self.module):
            return run(True)
        try:
            return run(False)
        except RuntimeError as error:  # a step that differentiates on its own, to adapt to a part of the batch
            if "require grad" not in str(error) or is_spread(self.module):
                raise
        return run(True)

    def _taped(
        self, kind: type[AnyTape], data: Any, draws: Draws | None = None, *, with_gradients: bool = False
    ) -> AnyTape:
        own = own_part(data, self.n_samples, self.batch_axis)
        of = (self.parameters, own, self.n_samples, self.batch_axis)
        tape = kind(*of, probing=True, shared=self.shared, draws=draws)
        try:
            with torch.set_grad_enabled(with_gradients), tape:
                self.run(copied(data))
        finally:
            tape.own_backward.forget()
        return tape
