"""Shares of loss tokens and of positions of use: each is what autograd gives for it alone, and they add up."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_gradtrace.capture.engines.loss_tokens import TokenChoice, TokenEngine
from lightning_gradtrace.capture.engines.tape import TapeEngine
from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.capture.passes import make_alone
from lightning_gradtrace.capture.placing.placement import UnattributableError
from lightning_gradtrace.capture.probing.probe import PermutationProbe
from lightning_gradtrace.capture.shares import OuterShare, RowShare, Share, SumShare
from lightning_gradtrace.capture.shares.contraction import OuterView
from tests.capture.test_against_oracle import assert_close
from tests.cases import CASES, IGNORE, Case, Decoder, Encoder

SEQUENCES = [case for case in CASES if case.batch(False)[1].dim() == 2]


def capture(engine: TapeEngine, model: nn.Module, batch, loss_of, n_samples: int, axis: int = 0) -> MicroBatch:
    """Run one taped forward and backward pass, with the passes of the loss tokens before the backward pass."""
    parameters = dict(model.named_parameters())
    look = PermutationProbe(model, parameters, model, batch[0], n_samples, axis)
    with engine.tape(parameters, batch, n_samples, axis) as tape:
        loss = loss_of(model, batch)
    passes = engine.passes(tape, loss, n_samples)
    if passes is not None:
        make_alone(model, passes, look)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()
    return engine.collect(tape, n_samples, look)


def prepared(case: Case, ignored: bool = True) -> tuple[nn.Module, tuple[Tensor, Tensor], int]:
    torch.manual_seed(0)
    model = case.build().double()
    inputs, targets = case.batch(ignored)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    return model, (inputs, targets), int((targets != IGNORE).sum())


@pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: case.name)
def test_every_loss_token_has_the_gradient_of_its_loss_alone(case: Case) -> None:
    model, batch, n_targets = prepared(case)
    engine = TokenEngine(choice=TokenChoice(None, "target", 99))
    found = capture(
        engine, model, batch, lambda m, b: case.loss(m, *b, "mean", n_targets), case.n_samples, case.batch_axis
    )
    targets = batch[1].movedim(case.batch_axis, 0)
    assert found.n_chosen.tolist() == (targets != IGNORE).sum(1).tolist()
    logits = model(batch[0]).movedim(case.batch_axis, 0)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for one in found.tokens:
        for i in range(case.n_samples):
            t = one.position[i]
            if t < 0:
                assert one.token[i] == -1
                continue
            assert one.token[i] == targets[i, t]
            loss = F.cross_entropy(logits[i, t], targets[i, t]) / n_targets
            expected = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for name, parameter, g in zip(names, parameters, expected, strict=True):
                g = torch.zeros_like(parameter) if g is None else g
                torch.testing.assert_close(one.shares[name].dense(slice(i, i + 1))[0], g, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("case", SEQUENCES, ids=lambda case: case.name)
def test_all_loss_tokens_of_a_sample_add_up_to_its_share(case: Case) -> None:
    model, batch, n_targets = prepared(case)
    engine = TokenEngine(choice=TokenChoice(None, "target", 99))
    found = capture(
        engine, model, batch, lambda m, b: case.loss(m, *b, "mean", n_targets), case.n_samples, case.batch_axis
    )
    assert len(found.tokens) == found.n_chosen.max()
    for name, share in found.shares.items():
        total = torch.stack([one.shares[name].dense() for one in found.tokens]).sum(0)
        assert_close(total, share.dense(), name)


def test_the_shares_of_the_samples_are_those_of_the_plain_tape() -> None:
    case = SEQUENCES[0]
    model, batch, n_targets = prepared(case)

    def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return case.loss(m, *b, "mean", n_targets)

    with_tokens = capture(
        TokenEngine(choice=TokenChoice(None, "target", 2)), model, batch, loss, case.n_samples, case.batch_axis
    )
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    plain = capture(TapeEngine(), model, batch, loss, case.n_samples, case.batch_axis)
    for name, p in model.named_parameters():
        assert torch.equal(gradients[name], p.grad)
        assert torch.equal(with_tokens.shares[name].dense(), plain.shares[name].dense())


def tokens_of(choice: TokenChoice, loss_of, model: nn.Module | None = None) -> tuple[MicroBatch, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Encoder(True).double() if model is None else model
    inputs, targets = torch.randint(1, 11, (3, 6)), torch.randint(0, 11, (3, 6))
    return capture(TokenEngine(choice=choice), model, (inputs, targets), loss_of, 3), inputs, targets


def flat_loss(model: nn.Module, batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def class_axis_loss(model: nn.Module, batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], label_smoothing=0.1)


def log_probability_loss(model: nn.Module, batch) -> Tensor:
    return F.nll_loss(F.log_softmax(model(batch[0]), -1).flatten(0, 1), batch[1].flatten(), reduction="sum")


@pytest.mark.parametrize("loss_of", [flat_loss, class_axis_loss, log_probability_loss])
@pytest.mark.parametrize("by", ["target", "input"])
def test_tokens_are_chosen_by_what_is_predicted_or_read(by, loss_of) -> None:
    wanted = (2, 5, 7)
    found, inputs, targets = tokens_of(TokenChoice(wanted, by, 2), loss_of)
    compared = targets if by == "target" else inputs
    mask = torch.isin(compared, torch.tensor(wanted))
    assert found.n_chosen.tolist() == mask.sum(1).tolist()
    for i in range(3):
        expected = mask[i].nonzero()[:2, 0].tolist()
        assert [int(one.position[i]) for one in found.tokens if one.position[i] >= 0] == expected
        assert [int(one.token[i]) for one in found.tokens if one.position[i] >= 0] == targets[i, expected].tolist()


def test_a_pass_forms_no_gradient_of_a_weight() -> None:
    """Those of a whole model, all at once, may not find room where a process holds pieces of it."""

    class Counted(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx, weight: Tensor) -> Tensor:
            return weight.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            Counted.calls += 1
            return gradient

    class Scaled(Encoder):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens) @ Counted.apply(self.scale)

    torch.manual_seed(0)
    model = Scaled(True).double()
    model.scale = nn.Parameter(torch.eye(11).double())
    batch = torch.randint(1, 11, (3, 6)), torch.randint(0, 11, (3, 6))
    engine = TokenEngine(choice=TokenChoice((1, 2), "target", 2))
    tracked = {name: p for name, p in model.named_parameters() if name != "scale"}
    with engine.tape(tracked, batch, 3) as tape:
        loss = flat_loss(model, batch)
    passes = engine.passes(tape, loss, 3)
    assert passes is not None
    make_alone(model, passes, PermutationProbe(model, tracked, model, batch[0], 3, 0))
    assert tape.passes and Counted.calls == 0
    loss.backward()
    assert Counted.calls == 1


def test_a_choice_that_meets_nothing_costs_no_pass() -> None:
    found, _, _ = tokens_of(TokenChoice((99,), "target", 2), flat_loss)
    assert found.tokens == [] and found.n_chosen.tolist() == [0, 0, 0]


class Normed(Decoder):
    """Batch norm in training mode: the loss of one sample reaches the activations of all."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(self.layer(x, torch.tanh(self.memory(x))))


@pytest.mark.parametrize(
    ("loss_of", "model", "message"),
    [
        (flat_loss, Normed, "gradients that flow through other samples"),
        (lambda m, b: flat_loss(m, b) + flat_loss(m, b), None, "depends on 2 calls of `cross_entropy`"),
        (lambda m, b: m(b[0]).square().mean(), None, "depends on 0 calls"),
        (lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), torch.ones(18, 11).double()), None, "Probabilities"),
    ],
    ids=["coupled", "two losses", "no loss", "probabilities"],
)
def test_what_has_no_loss_tokens_is_refused(loss_of, model, message: str) -> None:
    with pytest.raises(UnattributableError, match=message):
        tokens_of(TokenChoice(None, "target", 2), loss_of, None if model is None else model().double())


def test_a_choice_by_input_needs_token_ids() -> None:
    model = nn.Linear(4, 5).double()
    batch = torch.randn(3, 6, 4).double(), torch.randint(5, (3, 6))
    engine = TokenEngine(choice=TokenChoice((1,), "input", 2))
    with pytest.raises(ValueError, match="the batch has no token ids, expected one for each of the 6 loss tokens"):
        capture(engine, model, (batch[0],), lambda m, b: flat_loss(m, batch), 3)


def keeps_positions(share: Share) -> bool:
    if isinstance(share, SumShare):
        return all(map(keeps_positions, share.parts))
    return isinstance(share, (OuterShare, OuterView, RowShare))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_positions_of_use_add_up_to_the_share(case: Case) -> None:
    model, batch, n_targets = prepared(case, ignored=False)
    found = capture(
        TapeEngine(), model, batch, lambda m, b: case.loss(m, *b, "mean", n_targets), case.n_samples, case.batch_axis
    )
    n_checked = 0
    for name, share in found.shares.items():
        if not keeps_positions(share):
            with pytest.raises(ValueError, match=r"a `\w+` of shape .* keeps no positions"):
                share.by_position(0)
            continue
        for i in range(case.n_samples):
            assert_close(share.by_position(i).sum(0)[None], share.dense(slice(i, i + 1)), name)
            n_checked += 1
    assert n_checked


def test_a_position_of_a_table_that_looks_up_a_row_twice_keeps_both_apart() -> None:
    share = RowShare(torch.tensor([[1, 1, 0]]), torch.tensor([[[1.0], [2.0], [4.0]]]), 3)
    assert share.by_position(0)[:, :, 0].tolist() == [[0, 1, 0], [0, 2, 0], [4, 0, 0]]
