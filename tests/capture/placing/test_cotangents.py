"""Uses whose tensors are the same in any order of the samples."""

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


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("length", [4, 8])
def test_a_tensor_that_is_the_same_in_any_order_lies_as_what_it_is_added_to(length: int, n: int) -> None:
    torch.manual_seed(0)
    model = Net(words=nn.Embedding(11, 4), types=nn.Embedding(1, 4)).double()
    model.register_buffer("zeros", torch.zeros(1, 20, dtype=torch.long))
    x = torch.randint(2, 11, (n, length))

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        return embedded(m, x).square().sum(1)

    shares = capture(model, x, lambda m, x: losses(m, x).sum(), n=n).shares
    parameters = dict(model.named_parameters())
    for name, wanted in per_sample_gradients(lambda i: losses(model, x)[i], n, parameters).items():
        torch.testing.assert_close(shares[name].dense(), wanted)
