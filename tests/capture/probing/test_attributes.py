"""What hangs on a module is put back as it was, into the same objects; what can't be, keeps nothing else from it."""

from __future__ import annotations

import copy
import itertools
import random
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine
from torch.utils.data import DataLoader

from lightning_gradtrace.capture.probing.attributes import Attributes
from lightning_gradtrace.capture.probing.snapshot import undisturbed


@dataclass
class Averages:
    """Keeps averages of weights."""

    decay: float = 0.9
    shadow: dict[str, Tensor] = field(default_factory=lambda: {"w": torch.ones(2)})


@dataclass(slots=True)
class Slotted:
    """Has no dictionary."""

    count: Any = 0


class Upper(dict):
    """Spells its own way."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name.upper(), value)


def change_grad_leaf(leaf: Tensor) -> None:
    with torch.no_grad():
        leaf.add_(1)


def change_teacher(teachers: list[nn.Module]) -> None:
    with torch.no_grad():
        for tensor in teachers[0].state_dict().values():
            tensor.add_(1)
    teachers[0].eval()


def view(value: Any) -> Any:
    """Return what an object holds, in a form that can be compared."""
    if isinstance(value, Tensor):
        return value.to_dense().tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (list, deque, tuple, set)):
        return [view(one) for one in value]
    if isinstance(value, (dict, UserDict)):
        return [(name, view(one)) for name, one in value.items()]
    if isinstance(value, nn.Module):
        return value.training, view(dict(value.state_dict()))
    if isinstance(value, torch.Generator):
        return torch.rand(2, generator=copy.copy(value).clone_state()).tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return value.get_state()[1].tolist(), value.get_state()[2]
    if isinstance(value, Slotted):
        return value.count
    if isinstance(value, SobolEngine):
        return value.num_generated, value.quasi.tolist()
    return view(vars(value)) if hasattr(value, "__dict__") else value


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "list": (lambda: [1, [2]], lambda v: (v.append(3), v[1].append(4))),
    "dict": (lambda: {"n": 0, "w": torch.zeros(2)}, lambda v: (v.update(n=1), v["w"].add_(1))),
    "ordered": (lambda: OrderedDict(a=1, b=2), lambda v: v.move_to_end("a")),
    "default": (lambda: defaultdict(list, a=[1]), lambda v: v["b"].append(1)),
    "counter": (lambda: Counter(a=1), lambda v: v.update("ab")),
    "upper": (lambda: Upper(a=1), lambda v: v.update(b=2)),
    "set": (lambda: {1, 2}, lambda v: (v.add(3), v.discard(1))),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda v: v.append(3)),
    "tuple": (lambda: ([1], 2), lambda v: v[0].append(2)),
    "tensor": (lambda: torch.ones(3), lambda v: v.mul_(2)),
    "grown": (lambda: torch.ones(3), lambda v: v.resize_(5)),
    "leaf": (lambda: torch.ones(3, requires_grad=True), change_grad_leaf),
    "sparse": (lambda: torch.eye(3).to_sparse(), lambda v: v.mul_(2)),
    "array": (lambda: np.ones(3), lambda v: v.__imul__(2)),
    "generator": (lambda: torch.Generator().manual_seed(0), lambda v: torch.rand(1, generator=v)),
    "random": (lambda: random.Random(0), lambda v: v.random()),
    "numpy": (lambda: np.random.default_rng(0), lambda v: v.random()),
    "numpy of old": (lambda: np.random.RandomState(0), lambda v: v.rand()),
    "sobol": (lambda: SobolEngine(2, scramble=True, seed=0), lambda v: v.draw(3)),
    "object": (Averages, lambda v: (v.shadow["w"].mul_(2), setattr(v, "decay", 1.0), setattr(v, "new", 1))),
    "slots": (Slotted, lambda v: setattr(v, "count", 1)),
    "namespace": (lambda: SimpleNamespace(n=0), lambda v: setattr(v, "n", 1)),
    "user dict": (lambda: UserDict(n=0), lambda v: v.update(n=1)),
    "hidden module": (lambda: [nn.BatchNorm1d(2)], change_teacher),
}


@pytest.mark.parametrize(("make", "change"), CASES.values(), ids=CASES)
def test_what_hangs_on_a_module_is_put_back(make: Callable[[], Any], change: Callable[[Any], Any]) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].state = value = make()
    before = view(value)
    attributes = Attributes(module)
    for _ in range(2):
        change(value)
        assert view(value) != before
        module[0].state = None
        attributes.restore()
        assert module[0].state is value and type(value) is type(make())
        assert view(value) == before


def test_attributes_that_a_run_makes_are_taken_away() -> None:
    module = nn.Linear(2, 2)
    with undisturbed(module) as before:
        module.cache = torch.ones(2)
        before.restore()
        assert not hasattr(module, "cache") and module.training
    with undisturbed(module, keeps_mode=False):
        assert not module.training
    assert module.training


def test_nothing_is_written_where_nothing_has_changed() -> None:
    module = nn.BatchNorm1d(2)
    module.held = [torch.ones(2), torch.full((2,), torch.nan), torch.zeros(1).expand(3)]
    versions = [t._version for t in (*module.held, *module.buffers(), *module.parameters())]
    with undisturbed(module):
        pass
    assert versions == [t._version for t in (*module.held, *module.buffers(), *module.parameters())]


class Closed:
    """Does not let itself be looked at."""

    @property
    def __dict__(self) -> Any:
        raise RuntimeError("closed")


class Endless(list):
    """A list that can't be looped over."""

    def __iter__(self) -> Any:
        raise RuntimeError("endless")


def read_only(path: Path) -> list[Any]:
    array = np.ones(3)
    array.flags.writeable = False
    (path / "m").write_bytes(bytes(24))
    mapped = np.memmap(path / "m", np.float64, "r")
    return [array, mapped, np.broadcast_to(1.0, (3,)), torch.ones(2, device="meta"), random.SystemRandom()]


def test_odd_objects_keep_nothing_else_from_being_put_back(tmp_path: Path) -> None:
    module, chain = nn.Linear(2, 2), None
    for _ in range(5000):
        chain = [chain]
    module.odd = [*read_only(tmp_path), Closed(), Endless([1]), chain, lambda: 0, torch.float32, open]
    module.count = 0
    with undisturbed(module):
        module.count = 1
        torch.rand(1)
    assert module.count == 0


def test_an_error_is_raised_after_everything_else_was_put_back() -> None:
    module = nn.Linear(2, 2)
    module.array, module.count, state = np.ones(2), 0, torch.get_rng_state()

    def run() -> None:
        with undisturbed(module):
            module.array[0] = 2
            module.array.flags.writeable = False
            module.count = 1
            torch.rand(1)

    with pytest.raises(ValueError, match="read-only"):
        run()
    assert module.count == 0 and module.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "make",
    [lambda: iter([[1], [2], [3]]), lambda: iter(([1], [2], [3])), lambda: itertools.count(np.array([1]))],
    ids=["list", "tuple", "count"],
)
def test_a_run_takes_from_a_copy_of_an_iterator(make: Callable[[], Any]) -> None:
    module, source = nn.Linear(2, 2), make()
    module.source, module.held, module.slotted = source, [{"source": source}], Slotted(source)
    assert next(module.source) == [1]
    with undisturbed(module) as before:
        for _ in range(2):
            assert module.source and next(module.held[0]["source"]) == [2]
            next(module.source).__imul__(0)
            before.restore()
    assert module.source is module.held[0]["source"] is module.slotted.count is source
    assert [next(source), next(source)] == [[2], [3]]


def test_a_run_does_not_take_from_an_iterator_that_can_not_be_copied() -> None:
    module = nn.Linear(2, 2)
    module.sources = [
        (n for n in range(3)),
        map(abs, [0, 1]),
        iter(DataLoader(range(3))),
        zip([0]),
        itertools.cycle([0]),
    ]
    before = list(module.sources)
    with undisturbed(module):
        for source in module.sources:
            with pytest.raises(RuntimeError, match=r"takes from an iterator \(`.*`\), which can't be set back"):
                next(source)
    assert all(one is other for one, other in zip(module.sources, before, strict=True))
    assert [int(next(source)) for source in module.sources[:3]] == [0, 0, 0]


def test_an_iterator_that_a_run_begins_is_gone_with_it() -> None:
    module = nn.Linear(2, 2)
    module.source = source = iter([1])
    with undisturbed(module):
        assert list(module.source) == [1]
        module.source = iter([5])
        assert next(module.source) == 5
    assert module.source is source and list(source) == [1]


def test_attributes_of_classes_and_variables_around_functions_are_put_back() -> None:
    n, seen, weights, statistics = 0, [], torch.zeros(1), nn.BatchNorm1d(2)

    class Counted(nn.Module):
        count = 0
        seen: ClassVar[list[int]] = []
        sums: ClassVar[Tensor] = torch.zeros(1)
        source = torch.Generator()

        def forward(self) -> None:
            nonlocal n, late
            n += 1
            late = n
            weights.add_(torch.rand(1, generator=self.source))
            self.sums.add_(n)
            statistics(torch.ones(2, 2))
            seen.append(n)
            Counted.count += 1
            Counted.seen.append(n)
            Counted.made = n

    class Heir(Counted):
        pass

    if seen:
        late = 0
    module, state = Heir(), Counted.source.get_state()
    with undisturbed(module) as before:
        for _ in range(2):
            module.forward()
            assert n == late == Counted.count == Counted.sums == 1 and seen == Counted.seen == [1] == [Counted.made]
            before.restore()
            assert not weights.any() and not Counted.sums.any() and not statistics.num_batches_tracked
            assert torch.equal(Counted.source.get_state(), state) and module.forward.__closure__
            with pytest.raises(NameError):
                print(late)
            assert n == Counted.count == 0 and seen == Counted.seen == [] and not hasattr(Counted, "made")


def test_what_an_installed_package_keeps_is_not_followed_from_code(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(2, 2)
    module.act = lambda: monkeypatch
    with undisturbed(module):
        monkeypatch.setattr(module, "in_features", 3)
    assert module.in_features == 2 and len(monkeypatch._setattr) == 1
