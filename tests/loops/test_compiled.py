"""Functions that are compiled beside the model (`torch.compile`): the training stays what it is with them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradtrace import GradTrace
from lightning_gradtrace.capture.compiled import compiled_parts
from lightning_gradtrace.capture.placing.placement import UnattributableError
from tests.compatibility.cells import Kept
from tests.loops.losses import Training, check
from tests.loops.models import fit

WIDTH, N_CLASSES = 8, 5
pytestmark = [
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # the compiler looks
]


class Net(nn.Module):
    """Compiles a part of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, N_CLASSES)
        self.compiled: Any = torch.compile(self.body, backend="aot_eager")

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.scores(batch[0]), batch[1], reduction="none")

    def body(self, x: Any) -> Any:
        return x

    def scores(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Without(Net):
    """Compiles what holds no parameter."""

    def body(self, x: Tensor) -> Tensor:
        return F.gelu(x).softmax(-1) * 3

    def scores(self, x: Tensor) -> Tensor:
        return self.last(self.compiled(self.norm(self.first(x))))


class Inside(Net):
    """Compiles a method in which parameters are used."""

    def body(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.norm(self.first(x))).softmax(-1) * 3)

    def scores(self, x: Tensor) -> Tensor:
        return self.compiled(x)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.arange(12) % N_CLASSES), batch_size=4)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def test_a_compiled_function_without_parameters_is_followed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(Without(), loader, tmp_path)


def test_parameters_inside_of_a_compiled_function_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trace = GradTrace(tmp_path / "a.zarr", Kept(), params="*")
    with pytest.raises(UnattributableError, match=r"inside .* `torch\.compile`"):
        fit(Training(Inside().double()), trace, loader=loader(), max_epochs=1)


def test_a_training_with_a_compiled_function_goes_on_as_it_would(tmp_path: Path) -> None:
    """It was traced together with the tape, and gradients were wrong from the second step on."""
    torch.manual_seed(0)
    plain = Training(Inside().double())
    weights = copy.deepcopy(plain.state_dict())
    fit(plain, loader=loader(), max_epochs=2)
    torch._dynamo.reset()
    traced = Training(Inside().double())
    traced.load_state_dict(weights)
    trace = GradTrace(tmp_path / "a.zarr", Kept(), params="*", on_error="disable")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(traced, trace, loader=loader(), max_epochs=2)
    assert any("GradTrace stopped recording, training goes on" in str(one.message) for one in caught)
    for (name, a), b in zip(plain.state_dict().items(), traced.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_compiled_part_is_named_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].compile()
    model[1] = torch.compile(model[1])
    assert compiled_parts(model) == ["0", "1"]
