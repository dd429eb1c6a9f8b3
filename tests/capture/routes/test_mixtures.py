"""Never a wrong number: samples that are folded, moved, picked or mixed have exact shares, or there is one error."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_gradtrace.capture.forward.tape import Tape
from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.placing import settling
from lightning_gradtrace.capture.placing.placement import UnattributableError
from tests.capture.routes.mixtures import ELSEWHERE, EXACT, PERMUTED, SENT, SIZES, Model, Sizes
from tests.capture.test_attribution import Net, capture

Losses = Callable[[nn.Module, Tensor], Tensor]


def build(model: Model, s: Sizes) -> tuple[nn.Module, Tensor, Losses]:
    """Make a model, a batch, and the function that gives each sample's part of the loss."""
    torch.manual_seed(0)
    m = Net(**{name: part(s) for name, part in model.parts.items()}).double()
    x = torch.randn(s.n, s.length, s.width, dtype=torch.float64)

    def losses(m: nn.Module, x: Tensor) -> Tensor:
        y = model.run(m, x, s)
        return (y.abs() if y.is_complex() else y.sin()).reshape(len(x), -1).sum(1)

    return m, x, losses


def shares_of(m: nn.Module, x: Tensor, losses: Losses) -> tuple[MicroBatch, dict[str, Tensor]]:
    weight = torch.linspace(0.5, 2, len(x), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        found = capture(m, x, lambda m, x: losses(m, x) @ weight, n=len(x))
    used = {name: p for name, p in m.named_parameters() if name in found.shares}
    return found, per_sample_gradients(lambda i: losses(m, x[i : i + 1]).sum() * weight[i], len(x), used)


def n_equal(found: MicroBatch, expected: dict[str, Tensor]) -> int:
    """Compare shares with autograd, sample by sample, and return of how many parameters."""
    for name, g in expected.items():
        torch.testing.assert_close(found.shares[name].dense(), g, msg=lambda text, name=name: f"{name}: {text}")
    return len(expected)


@pytest.mark.parametrize("s", SIZES, ids=str)
@pytest.mark.parametrize("model", EXACT, ids=lambda model: model.name)
def test_samples_that_are_moved_about_keep_their_shares(model: Model, s: Sizes) -> None:
    assert n_equal(*shares_of(*build(model, s))) > 0


@pytest.mark.parametrize("s", SIZES, ids=str)
@pytest.mark.parametrize("model", SENT, ids=lambda model: model.name)
def test_tokens_that_are_sent_to_slots_belong_to_their_samples(model: Model, s: Sizes) -> None:
    """Who finds a slot depends on the tokens before, so the oracle differentiates the losses of the whole batch."""
    m, x, losses = build(model, s)
    weight = torch.linspace(0.5, 2, len(x), dtype=torch.float64)
    found = capture(m, x, lambda m, x: losses(m, x) @ weight, n=len(x))
    used = {name: p for name, p in m.named_parameters() if name in found.shares}
    assert n_equal(found, per_sample_gradients(lambda i: losses(m, x)[i] * weight[i], len(x), used)) == 5


@pytest.mark.parametrize("model", PERMUTED, ids=lambda model: model.name)
def test_samples_that_a_matrix_permutes_are_followed_or_refused(model: Model) -> None:
    exact = 0
    for s in SIZES:
        try:
            exact += n_equal(*shares_of(*build(model, s)))
        except UnattributableError:
            continue
    assert exact


@pytest.mark.parametrize("model", ELSEWHERE, ids=lambda model: model.name)
def test_rows_that_are_no_longer_the_samples_are_named(model: Model) -> None:
    """An axis with as many entries as there are samples is not taken for them, unless they are in it after all."""
    refused = 0
    for s in SIZES:
        m, x, losses = build(model, s)
        x[:, 0, 0] = torch.arange(s.n, 0, -1)  # rows that are sorted by it change places
        try:
            found, expected = shares_of(m, x, losses)
        except UnattributableError as error:
            assert re.match(
                r"GradTrace: can't attribute `\w+.* (no axis|in use \d .*) hold.* the \d samples", str(error)
            )
            refused += 1
            continue
        n_equal(found, expected)
    assert refused >= len(SIZES) - 1


@pytest.mark.parametrize("model", EXACT, ids=lambda model: model.name)
def test_combinations_over_features_tell_as_much_as_whole_tensors(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe keeps of large tensors only as much as it needs."""
    monkeypatch.setattr(settling, "SMALL", 0)
    assert n_equal(*shares_of(*build(model, SIZES[1]))) > 0


def test_large_tensors_are_not_kept_whole_by_the_probe() -> None:
    m, x = nn.Linear(512, 4), torch.randn(4, 64, 512)
    with Tape(dict(m.named_parameters()), x, 4, probing=True) as tape, torch.no_grad():
        m(x)
    (kept,) = tape.uses[0].operands.values()
    assert kept.tensor.shape == (4, 64, 1)


@pytest.mark.parametrize(
    ("n", "tokens"), [*((n, False) for n in (2, 3, 4, 5, 6, 8)), *((n, True) for n in (2, 3, 4, 6, 8))]
)
@pytest.mark.parametrize("n_experts", [2, 3, 4, 7, 8])
def test_experts_that_are_picked_by_a_tensor_of_the_batch(n_experts: int, n: int, tokens: bool) -> None:
    """As many experts, or as many with samples, as there are samples or a multiple of that: neither are samples."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = Net(words=nn.Embedding(11, 4), experts=(n_experts, 4, 4)).double()
        x, gate = torch.randint(2, 11, (n, 5)), torch.randn(4, n_experts).double()

        def losses(m: nn.Module, x: Tensor) -> Tensor:
            hidden = m.words(x).flatten(0, 1) if tokens else m.words(x).mean(1)
            chosen, out = (hidden @ gate).argmax(1), hidden.new_zeros(len(hidden), 4)  # noqa: B023
            for expert in nn.functional.one_hot(chosen, n_experts).sum(0).nonzero():
                rows = (chosen == expert[0]).nonzero()[:, 0]
                out = out.index_add(0, rows, hidden[rows] @ m.experts[expert[0]])
            return out.square().view(n, -1).sum(1)

        shares = capture(model, x, lambda m, x: losses(m, x).sum(), n=n).shares
        parameters = dict(model.named_parameters())
        for name, wanted in per_sample_gradients(lambda i: losses(model, x)[i], n, parameters).items():  # noqa: B023
            torch.testing.assert_close(shares[name].dense(), wanted)


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("n_experts", [2, 4, 7])
def test_experts_that_hits_of_a_mask_pick_layer_after_layer(n_experts: int, n: int) -> None:
    """Mixtral in Hugging Face's eager form: a mask of (expert, choice, token), and sums written into zeros."""
    for seed in range(3):
        torch.manual_seed(seed)
        layers = {f"{part}{i}": (n_experts, 4, 4) for part in ("up", "down") for i in range(2)}
        gates = {f"gate{i}": nn.Linear(4, n_experts) for i in range(2)}
        model = Net(words=nn.Embedding(11, 4), out=nn.Linear(4, 3), **layers, **gates).double()
        x = torch.randint(11, (n, 5))

        def mixed(m: nn.Module, hidden: Tensor, i: int) -> Tensor:
            flat = hidden.reshape(-1, 4)
            weights, chosen = getattr(m, f"gate{i}")(flat).softmax(1).topk(2, -1)
            mask, out = nn.functional.one_hot(chosen, n_experts).permute(2, 1, 0), torch.zeros_like(flat)
            for expert in torch.greater(mask.sum((-1, -2)), 0).nonzero():
                place, token = torch.where(mask[expert.item()])
                up, down = (getattr(m, f"{part}{i}")[expert.item()] for part in ("up", "down"))
                found = nn.functional.linear(nn.functional.linear(flat[token], up).tanh(), down)
                out.index_add_(0, token, found * weights[token, place, None])
            return out.view(hidden.shape)

        def losses(m: nn.Module, x: Tensor) -> Tensor:
            hidden = m.words(x)
            for i in range(2):
                hidden = hidden + mixed(m, hidden, i)
            return m.out(hidden).square().sum((1, 2))

        shares = capture(model, x, lambda m, x: losses(m, x).sum(), n=n).shares
        used = {name: p for name, p in model.named_parameters() if name in shares}
        for name, wanted in per_sample_gradients(lambda i: losses(model, x[i : i + 1]).sum(), n, used).items():  # noqa: B023
            torch.testing.assert_close(shares[name].dense(), wanted)
