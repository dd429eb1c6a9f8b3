"""Uses whose tensors are the same in any order of the samples, or hold none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_gradtrace.capture.oracle import per_sample_gradients
from tests.capture.test_attribution import Net, capture


def embedded(m: nn.Module, x: Tensor) -> Tensor:
    """Token types of zeros, picked by positions that come of the batch, as RoBERTa has them."""
    mask = (x != 1).long()
    types = torch.gather(m.zeros.expand(len(x), -1), 1, mask.cumsum(1) * mask)
    return (m.words(x) + m.types(types)).tanh().mean(1)


def picked(m: nn.Module, x: Tensor) -> Tensor:
    """Experts by a number that is a tensor of the batch."""
    hidden = m.words(x).mean(1)
    chosen = (hidden[:, :1] > 0).long()[:, 0]
    out = hidden.new_zeros(len(x), 4)
    for expert in torch.nn.functional.one_hot(chosen, 7).sum(0).nonzero():
        rows = (chosen == expert[0]).nonzero()[:, 0]
        out = out.index_add(0, rows, hidden[rows] @ m.experts[expert[0]])
    return out


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("length", [4, 8])
@pytest.mark.parametrize("run", [embedded, picked], ids=lambda run: run.__name__)
def test_shares_are_those_of_one_sample_at_a_time(run, length: int, n: int) -> None:
    torch.manual_seed(0)
    model = Net(words=nn.Embedding(11, 4), types=nn.Embedding(1, 4), experts=(7, 4, 4)).double()
    model.register_buffer("zeros", torch.zeros(1, 20, dtype=torch.long))
    x = torch.randint(2, 11, (n, length))

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        return run(m, x).square().sum(1)

    shares = capture(model, x, lambda m, x: losses(m, x).sum(), n=n).shares
    used = {name: p for name, p in model.named_parameters() if name in shares}
    assert len(used) == 2
    for name, wanted in per_sample_gradients(lambda i: losses(model, x)[i], n, used).items():
        torch.testing.assert_close(shares[name].dense(), wanted)
