"""TorchScript hides uses: tracked parameters in it are refused, and everything else goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradtrace import Dense, GradTrace, TopK, open_trace
from lightning_gradtrace.capture.placing.placement import UnattributableError
from tests.loops.models import WIDTH, Net, data, fit

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.\w+` is (deprecated|not supported)")

BATCH = 4


def scripted(how: str, part: nn.Module, width: int) -> torch.jit.ScriptModule:
    return torch.jit.script(part) if how == "script" else torch.jit.trace(part, torch.randn(BATCH, width))


def losses(module: nn.Module, batch: Any) -> Tensor:
    return (module(batch[0]) - batch[1]).square().mean(1) / len(batch[0])


class Plain(Net):
    """Without dropout."""

    def __init__(self, how: str = "script") -> None:
        super().__init__()
        self.how = how

    def forward(self, x):
        return self.last(self.first(x).tanh())

    def training_step(self, batch, batch_idx):
        return losses(self, batch).sum()


class Scripted(Plain):
    """A part with parameters is TorchScript."""

    def __init__(self, how: str = "script") -> None:
        super().__init__(how)
        self.first = scripted(how, nn.Sequential(self.first), WIDTH)


class Late(Plain):
    """The same, made when the training begins."""

    def configure_model(self):
        if not isinstance(self.first, torch.jit.ScriptModule):
            self.first = scripted(self.how, nn.Sequential(self.first), WIDTH)


class Between(Plain):
    """A part without parameters is TorchScript."""

    def __init__(self, how: str = "script") -> None:
        super().__init__(how)
        self.between = scripted(how, nn.Sequential(nn.Tanh(), nn.Softplus()), 7)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Tied(Plain):
    """A scripted module holds a parameter of another one."""

    def __init__(self, how: str = "script") -> None:
        super().__init__(how)
        again = nn.Linear(7, 2)
        again.weight = self.last.weight
        self.again = scripted(how, again, 7)

    def forward(self, x):
        return super().forward(x) + self.again(self.first(x))


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize(
    ("kind", "module", "parameter"),
    [(Scripted, "first", "first.0.weight"), (Late, "first", "first.0.weight"), (Tied, "again", "last.weight")],
)
def test_tracked_parameters_of_a_scripted_module_are_refused(kind, module, parameter, how, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"`{module}` of `{kind.__name__}` is TorchScript .* uses of `{parameter}`"):
        fit(kind(how), GradTrace(tmp_path / "a.zarr", TopK(3)))
    assert not (tmp_path / "a.zarr").exists()


FUNCTIONAL = {"engine": "functional", "per_sample_loss": losses, "params": "*"}


@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [(Between, {"params": "*"}), (Scripted, {"params": "last.*"}), (Scripted, FUNCTIONAL), (Tied, FUNCTIONAL)],
    ids=["no parameters", "left out", "functional", "tied"],
)
def test_scripted_modules_that_hide_nothing(kind: type, options: dict[str, Any], how: str, tmp_path: Path) -> None:
    """Every share of the first step is the gradient of its sample alone."""
    pl.seed_everything(3, verbose=False)
    model = kind(how)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    traced = GradTrace(tmp_path / "a.zarr", Dense(), quantity="gradient", ledger_every_n_steps=1, **options)
    fit(model, traced, loader=DataLoader(data(), BATCH), max_epochs=1)
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.attrs["complete"] and trace.verify().ok and trace.steps["sum_error"].max() < 1e-5
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    x, y = (t[:BATCH] for t in data().tensors)
    for i in range(BATCH):
        model.zero_grad()
        (losses(model, (x[i : i + 1], y[i : i + 1])).sum() / BATCH).backward()
        for name in trace.params["param"]:
            found, expected = trace.dense[name][i], model.get_parameter(name).grad.numpy()
            np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max(), err_msg=name)
            assert expected.any()


def test_a_scripted_function_is_among_the_causes_of_an_unseen_use(tmp_path: Path) -> None:
    class Function(Plain):
        def forward(self, x):
            return self.last(product(x, self.first.weight).tanh())

    product = torch.jit.trace(lambda x, w: x @ w.T, (torch.randn(BATCH, WIDTH), torch.randn(7, WIDTH)))
    with pytest.raises(UnattributableError, match=r"`first\.weight` .*don't add up to `.grad`.* TorchScript,"):
        fit(Function(), GradTrace(tmp_path / "a.zarr", TopK(3)))


@torch.jit.script
def turned(x: Tensor) -> Tensor:
    return x.flip(0) * 2


def test_samples_that_a_scripted_function_moves_are_not_taken_for_others(tmp_path: Path) -> None:
    """No size is that of the batch, so that nothing else leaves doubt."""

    class Moved(Plain):
        def forward(self, x):
            return self.last(turned(self.first(x)))

    assert BATCH not in {size for p in Moved().parameters() for size in p.shape}
    with pytest.raises(UnattributableError, match=r"`last\.weight`.* no axis was found to hold the 4 samples"):
        fit(Moved(), GradTrace(tmp_path / "a.zarr", TopK(3), params="*"))
