"""Random numbers of the device: a step that draws them there is split as autograd splits it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gradtrace.capture.engines.tape import TapeEngine
from lightning_gradtrace.capture.oracle import per_sample_gradients
from tests.capture.probing.noises import LENGTH, ORDINARY, SHARED, WIDTH, Training, net, squares
from tests.capture.test_attribution import Net, capture
from tests.device.devices import CUDA, Device

N = 4
STEPS = 4


@pytest.fixture
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def compare(training: Training, place: Device, x: Tensor, n: int, error: float) -> TapeEngine:
    """Capture some steps there, and compare the shares of every parameter with autograd's, sample by sample."""
    torch.manual_seed(0)
    model, engine = Net(**training.parts(n)).to(place.name), TapeEngine()

    def losses(module: nn.Module, data: Tensor) -> Tensor:
        torch.manual_seed(step)
        return training.run(module, data, n)

    for step in range(STEPS):
        batch = x + step
        shares = capture(model, batch, lambda module, data: losses(module, data).sum(), engine, n).shares
        expected = per_sample_gradients(
            lambda i, batch=batch: losses(model, batch)[i], n, dict(model.named_parameters())
        )
        for name, wanted in expected.items():
            found = shares[name].dense()
            assert (found - wanted).norm() <= error * wanted.norm(), (name, step)
    return engine


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("training", [*ORDINARY, *SHARED], ids=lambda training: training.name)
def test_numbers_drawn_there_go_to_whom_they_belong(training: Training, device: Device) -> None:
    with torch.device(device.name):
        engine = compare(training, device, torch.randn(N, LENGTH, WIDTH), N, 1e-9)
    assert bool(engine.sharing.shared) == (training in SHARED)


@dataclass
class Layers:
    """Layers of a kernel that draws random numbers itself, and how large the error of its numbers is."""

    name: str
    run: Callable[[nn.Module, Tensor, int], Tensor]
    make: Callable[[], nn.Module]
    dtype: torch.dtype
    error: float


def attention(m: nn.Module, x: Tensor, n: int) -> Tensor:
    q, k, v = (y.unflatten(2, (2, -1)).transpose(1, 2) for y in m.layer(x).chunk(3, 2))
    y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.4)
    return squares(m.out(y.transpose(1, 2).flatten(2)).float())


def recurrent(m: nn.Module, x: Tensor, n: int) -> Tensor:
    return squares(m.out(m.layer(x)[0]))


KERNELS = [
    Layers("attention, bfloat16", attention, lambda: nn.Linear(64, 192), torch.bfloat16, 3e-2),
    Layers("attention, float16", attention, lambda: nn.Linear(64, 192), torch.float16, 1e-2),
    Layers("attention, float32", attention, lambda: nn.Linear(64, 192), torch.float32, 1e-4),
    Layers("LSTM", recurrent, lambda: nn.LSTM(64, 64, 2, dropout=0.4, batch_first=True), torch.float32, 1e-4),
    Layers("GRU", recurrent, lambda: nn.GRU(64, 64, 2, dropout=0.4, batch_first=True), torch.float32, 1e-4),
]


@pytest.mark.parametrize("length", [N, 6], ids=["square", "oblong"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_dropout_inside_a_kernel_is_that_of_the_step(kernel: Layers, length: int) -> None:
    parts = lambda n: {"layer": kernel.make().to(kernel.dtype), "out": net(64, 64).to(kernel.dtype)}  # noqa: E731
    training = Training(kernel.name, kernel.run, parts)
    x = torch.randn(N, length, 64, device=CUDA.name, dtype=kernel.dtype)
    engine = compare(training, CUDA, x, N, kernel.error)
    assert not engine.sharing.shared  # and every share was that of autograd
