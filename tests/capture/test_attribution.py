"""Uses that mix samples are split by parts of their outputs, or named; what can't be repeated is named."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gradtrace.capture.check import check_sums, sum_errors
from lightning_gradtrace.capture.engines.tape import TapeEngine
from lightning_gradtrace.capture.micro_batch import MicroBatch
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.placing.placement import UnattributableError
from lightning_gradtrace.capture.probing.probe import PermutationProbe
from lightning_gradtrace.capture.shares import DenseShare
from lightning_gradtrace.update.clipping import dense

N = 4


def capture(
    model: nn.Module,
    batch: object,
    loss: Callable[[nn.Module, object], Tensor],
    engine: TapeEngine | None = None,
    n: int = N,
) -> MicroBatch:
    engine, parameters = engine or TapeEngine(), dict(model.named_parameters())
    step = Step(functools.partial(loss, model))
    model.zero_grad()
    tape = engine.tape(parameters, batch, n)
    with tape:
        value = step(batch)
    tape.forget_backward()  # of gradients that the forward pass took
    value.backward()
    micro_batch = engine.collect(tape, n, PermutationProbe(model, parameters, step, batch, n, 0, tape.state))
    gradients = {name: dense(p.grad) for name, p in parameters.items() if p.grad is not None}
    advice = functools.partial(engine.advice, [micro_batch], gradients)
    check_sums(sum_errors([micro_batch], gradients), gradients, advice=advice)
    return micro_batch


class Step(nn.Module):
    """Runs a training step: what it draws is known by its lines of code up to there."""

    def __init__(self, loss: Callable[[object], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def training_step(self, batch: object) -> Tensor:
        return self.loss(batch)

    def forward(self, batch: object) -> Tensor:
        return self.training_step(batch)


class Net(nn.Module):
    """Holds parameters; the forward pass is a function of the test."""

    def __init__(self, **parameters: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(torch.randn(value)) if isinstance(value, tuple) else value)


def masked_output_oracle(model: nn.Module, output: Callable[[], Tensor], cotangent: Tensor) -> dict[str, Tensor]:
    """Differentiate the part of an output that belongs to each sample, times the loss's gradient there."""
    return per_sample_gradients(lambda i: (output()[i] * cotangent[i]).sum(), N, dict(model.named_parameters()))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training_is_split_by_its_outputs(affine: bool) -> None:
    torch.manual_seed(0)
    model = Net(norm=nn.BatchNorm1d(6, affine=affine), first=nn.Linear(6, 6)).double()
    x = torch.randn(N, 6).double()
    kept: list[Tensor] = []

    def loss(model: nn.Module, x: object) -> Tensor:
        y = model.norm(model.first(x))
        if y.requires_grad:
            y.retain_grad()
            kept.append(y)
        return y.pow(3).sum()

    shares = capture(model, x, loss).shares
    (y,) = kept
    if affine:
        model.norm.track_running_stats = False
        expected = per_sample_gradients(
            lambda i: (
                F.batch_norm(model.first(x), None, None, model.norm.weight, model.norm.bias, True)[i] * y.grad[i]
            ).sum(),
            N,
            {"w": model.norm.weight, "b": model.norm.bias},
        )
        torch.testing.assert_close(shares["norm.weight"].dense(), expected["w"])
        torch.testing.assert_close(shares["norm.bias"].dense(), expected["b"])
    torch.testing.assert_close(shares["first.weight"].total(), model.first.weight.grad)
    assert int(model.norm.num_batches_tracked) == 1  # nothing of the capture ran the layer again


def test_a_layer_after_a_statistic_of_the_batch_is_split_by_the_samples_that_it_meets() -> None:
    """Virtual nodes, batch context: `lin(x.mean(0))` holds no samples; the sum with every sample does."""
    torch.manual_seed(0)
    model = Net(context=nn.Linear(6, 6), gate=(6,)).double()
    x = torch.randn(N, 6).double()
    shares = capture(model, x, lambda m, x: (x * torch.tanh(m.context(x.mean(0))) * m.gate).pow(2).sum()).shares

    def part(i: int) -> Tensor:
        return (x[i] * torch.tanh(model.context(x.mean(0))) * model.gate).pow(2).sum()

    expected = per_sample_gradients(part, N, dict(model.named_parameters()))
    for name, g in expected.items():
        torch.testing.assert_close(shares[name].dense(), g)


def test_samples_against_samples_are_split_by_the_first() -> None:
    """In-batch negatives with a learned temperature: the share of a sample is that of its row of the logits."""
    torch.manual_seed(0)
    model = Net(query=nn.Linear(6, 5), key=nn.Linear(6, 5), temperature=()).double()
    batch = (torch.randn(N, 6).double(), torch.randn(N, 6).double())

    def logits(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        q, k = F.normalize(m.query(batch[0]), dim=-1), F.normalize(m.key(batch[1]), dim=-1)
        return q @ k.T * m.temperature.exp()

    shares = capture(model, batch, lambda m, b: F.cross_entropy(logits(m, b), torch.arange(N))).shares
    full = logits(model, batch)
    (d,) = torch.autograd.grad(F.cross_entropy(full, torch.arange(N)), full)
    expected = [(d[i] * full[i]).sum() for i in range(N)]  # d/dt of exp(t) z is exp(t) z
    torch.testing.assert_close(shares["temperature"].dense(), torch.stack(expected))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_inside_a_recurrent_network_is_replayed(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = Net(rnn=kind(5, 4, num_layers=3, dropout=0.5, batch_first=True)).double()
    x = torch.randn(N, 6, 5).double()
    engine = TapeEngine()
    for _ in range(2):  # found out in the first step, known in the second
        shares = capture(model, x, lambda m, x: m.rnn(x)[0].pow(2).sum(), engine).shares
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(shares[name].total(), parameter.grad)
    # A sample whose outputs don't count has no share, and takes none from the others.
    shares = capture(model, x, lambda m, x: m.rnn(x)[0][1:].pow(2).sum()).shares
    assert all(share.dense()[0].abs().max() == 0 for share in shares.values())


def test_dropped_weights_are_replayed() -> None:
    torch.manual_seed(0)
    model = Net(w=(5, 6)).double()
    x = torch.randn(N, 6).double()
    shares = capture(model, x, lambda m, x: F.linear(x, F.dropout(m.w, 0.5)).pow(2).sum()).shares
    mask = model.w.grad != 0
    assert 0 < mask.sum() < mask.numel()
    assert (shares["w"].dense()[:, ~mask] == 0).all()
    torch.testing.assert_close(shares["w"].total(), model.w.grad)


def test_noise_for_the_generator_counts_as_batched() -> None:
    torch.manual_seed(0)
    model = Net(net=nn.Linear(3, 5)).double()
    noise: list[Tensor] = []

    def loss(m: nn.Module, batch: object) -> Tensor:
        noise.append(torch.randn(N, 3, dtype=torch.float64))
        return m.net(noise[-1]).pow(2).sum()

    shares = capture(model, torch.randn(N, 7), loss).shares
    expected = per_sample_gradients(
        lambda i: model.net(noise[0][i : i + 1]).pow(2).sum(), N, dict(model.named_parameters())
    )
    torch.testing.assert_close(shares["net.weight"].dense(), expected["net.weight"])


def test_tensors_made_from_numbers_of_the_batch_count_as_batched() -> None:
    torch.manual_seed(0)
    model = Net(table=nn.Embedding(9, 5)).double()
    words = [[1, 2, 3], [4, 5, 6], [7, 8, 0], [1, 1, 1]]
    shares = capture(model, {"words": words}, lambda m, b: m.table(torch.tensor(b["words"])).pow(2).sum()).shares
    expected = per_sample_gradients(
        lambda i: model.table(torch.tensor(words[i])).pow(2).sum(), N, dict(model.named_parameters())
    )
    torch.testing.assert_close(shares["table.weight"].dense(), expected["table.weight"])
    tokens = torch.tensor(words)
    shares = capture(model, tokens, lambda m, b: m.table(torch.as_tensor(b.numpy() + 0)).pow(2).sum()).shares
    torch.testing.assert_close(shares["table.weight"].dense(), expected["table.weight"])


@pytest.mark.parametrize("kind", ["item", "view", "method"])
def test_what_is_written_into_a_tensor_makes_it_batched(kind: str) -> None:
    torch.manual_seed(0)
    model = Net(first=(3,), second=(2, 3)).double()
    x = torch.randn(N, 3).double()

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), 2, 3, dtype=x.dtype)
        if kind == "item":
            out[:, 0] = x * m.first
            out[:, 1] = x
        elif kind == "view":
            out[:, 1].copy_(x.detach() * m.first)
            out[:, 0].add_(x)
        else:
            out.index_copy_(1, torch.tensor([1, 0]), torch.stack([x * m.first, x], 1))
        return (out * m.second).pow(2).sum()

    shares = capture(model, x, loss).shares
    expected = per_sample_gradients(lambda i: loss(model, x[i : i + 1]), N, dict(model.named_parameters()))
    for name, g in expected.items():
        torch.testing.assert_close(shares[name].dense(), g)


def test_tracked_tensors_that_are_filled_in_place_stay_tracked() -> None:
    """A kernel matrix assembled from a parameter, then met by the batch; a table into which samples are written."""
    torch.manual_seed(0)
    model = Net(diagonal=(5,), table=(N, 5)).double()
    x = torch.randn(N, 5).double()

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        kernel = torch.zeros(5, 5, dtype=x.dtype)
        kernel[torch.arange(5), torch.arange(5)] = m.diagonal.exp()
        kernel[0] += m.diagonal * 2
        table = m.table[: len(x)] * 1
        table[:, 1:3] = x[:, 1:3]
        return (F.linear(x, kernel) * table).pow(2).sum()

    shares = capture(model, x, loss).shares
    full = (F.linear(x, kernel_of(model)) * filled(model, x)).pow(2)
    for name, parameter in model.named_parameters():
        expected = [torch.autograd.grad(full[i].sum(), parameter, retain_graph=True)[0] for i in range(N)]
        torch.testing.assert_close(shares[name].dense(), torch.stack(expected))


def kernel_of(m: nn.Module) -> Tensor:
    return torch.diag(m.diagonal.exp()) + F.pad((m.diagonal * 2)[None], (0, 0, 0, 4))


def filled(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([m.table[:, :1], x[:, 1:3], m.table[:, 3:]], 1)


@dataclass
class Record:
    x: Tensor
    y: Tensor


class Plain:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


@pytest.mark.parametrize(
    "wrap", [Record, Plain, lambda x, y: {"a": {"x": x}, "b": [y]}], ids=["dataclass", "object", "dict"]
)
def test_batches_of_any_kind(wrap: Callable[[Tensor, Tensor], object]) -> None:
    torch.manual_seed(0)
    model = Net(first=nn.Linear(4, 4), place=(N, 4)).double()
    x, y = torch.randn(N, 4).double(), torch.randn(N, 4).double()

    def loss(m: nn.Module, batch: object) -> Tensor:
        a = batch["a"]["x"] if isinstance(batch, dict) else batch.x
        b = batch["b"][0] if isinstance(batch, dict) else batch.y
        return (torch.tanh(m.first(a)) @ m.place - b).pow(2).sum()

    shares = capture(model, wrap(x, y), loss).shares
    expected = per_sample_gradients(
        lambda i: (torch.tanh(model.first(x[i])) @ model.place - y[i]).pow(2).sum(), N, dict(model.named_parameters())
    )
    for name, g in expected.items():
        torch.testing.assert_close(shares[name].dense(), g)


def test_siamese_towers_add_up_over_both_inputs() -> None:
    torch.manual_seed(0)
    model = Net(tower=nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 4))).double()
    batch = (torch.randn(N, 4).double(), torch.randn(N, 4).double())
    shares = capture(model, batch, lambda m, b: (m.tower(b[0]) - m.tower(b[1])).abs().sum()).shares
    expected = per_sample_gradients(
        lambda i: (model.tower(batch[0][i]) - model.tower(batch[1][i])).abs().sum(), N, dict(model.named_parameters())
    )
    for name, g in expected.items():
        torch.testing.assert_close(shares[name].dense(), g)


# --- one clear error ------------------------------------------------------------------------------------------------


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, d):
        x, w = ctx.saved_tensors
        return d * w, (d * x).sum(0)


def test_a_use_inside_a_custom_function_is_noticed() -> None:
    model, x = Net(w=(6,), v=(6,)), torch.randn(N, 6)
    message = r"the per-sample gradients of `w` .*don't add up to `.grad`.*custom `torch.autograd.Function`"
    with pytest.raises(UnattributableError, match=message):
        capture(model, x, lambda m, x: (Square.apply(x, m.w) * m.v).sum())


def test_the_output_of_a_custom_function_is_batched() -> None:
    torch.manual_seed(0)
    model, x = Net(v=(6,)).double(), torch.randn(N, 6).double().requires_grad_()
    w = torch.randn(6).double()
    shares = capture(model, x, lambda m, x: (Square.apply(x, w) * m.v).sum()).shares
    torch.testing.assert_close(shares["v"].dense(), x.detach() * w)


def penalty_on_gradients(m: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (d,) = torch.autograd.grad(m.lin(x).tanh().square().sum(), x, create_graph=True)
    return d.square().sum()


def doubled_on_its_way(m: nn.Module, x: Tensor) -> Tensor:
    y = m.lin(x)
    if y.requires_grad:
        y.register_hook(lambda d: 2 * d)
    return y.square().sum()


def doubled_at_the_end(m: nn.Module, x: Tensor) -> Tensor:
    hook = m.lin.weight.register_hook(lambda g: 2 * g)
    m.hooks = [*getattr(m, "hooks", []), hook]
    return m.lin(x).square().sum()


UNSEEN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "a penalty on gradients": penalty_on_gradients,
    "vmap": lambda m, x: torch.func.vmap(lambda one: F.linear(one, m.lin.weight, m.lin.bias))(x).sum(),
    "a hook of a tensor": doubled_on_its_way,
    "a hook of a parameter": doubled_at_the_end,
    "a nested tensor": lambda m, x: m.lin(torch.nested.nested_tensor([x[:1], x[1:]])).unbind()[0].square().sum(),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("loss", UNSEEN.values(), ids=UNSEEN.keys())
def test_what_can_not_be_seen_is_named(loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model, x = Net(lin=nn.Linear(6, 3)), torch.randn(N, 6)
    message = r"`lin.weight` .*don't add up to `.grad`.*hook of a tensor or a parameter.*leave the parameter out"
    with pytest.raises(UnattributableError, match=message):
        capture(model, x, loss)


def test_a_step_that_can_not_be_run_again_is_named_where_sizes_leave_doubt() -> None:
    model, x = Net(lin=nn.Linear(N, 3)), torch.randn(N, N, N)
    message = r"`lin.weight`, `lin.bias`: in use 0 .* could not be run again .*ValueError: only once.*batch size"
    calls: list[int] = []

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) > 1:
            raise ValueError("only once")
        return m.lin(torch.cummax(x, 2).values).sum()

    with pytest.raises(UnattributableError, match=message):
        capture(model, x, loss)


@pytest.mark.parametrize("n", [N, N + 1])
def test_a_step_that_takes_gradients_of_its_own(n: int) -> None:
    """First-order MAML, one task after the other; the probe leaves no gradients, and calls no hooks of them."""
    torch.manual_seed(0)
    model = Net(first=nn.Linear(N, N), last=nn.Linear(N, 1)).double()
    x, y = torch.randn(n, N, N).double(), torch.randn(n, N, 1).double()
    outside, calls = torch.ones(3, requires_grad=True), []
    outside.register_hook(calls.append)

    def run(p: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = F.linear(x, p["first.weight"], p["first.bias"]).tanh()
        return F.linear(hidden, p["last.weight"], p["last.bias"])

    def one(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        p = dict(m.named_parameters())
        slopes = torch.autograd.grad(F.mse_loss(run(p, x[:2]), y[:2]), list(p.values()))
        p = {name: value - 0.1 * slope for (name, value), slope in zip(p.items(), slopes, strict=True)}
        return F.mse_loss(run(p, x[2:]), y[2:])

    def loss(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        (outside * batch[0].mean().float()).sum().backward()
        return torch.stack([one(m, *task) for task in zip(*batch, strict=True)]).mean()

    shares = capture(model, (x, y), loss, n=n).shares
    assert len(calls) == 1
    torch.testing.assert_close(outside.grad, x.mean().float().expand(3))
    expected = per_sample_gradients(lambda i: one(model, x[i], y[i]) / n, n, dict(model.named_parameters()))
    for name, g in expected.items():
        torch.testing.assert_close(shares[name].dense(), g)


def test_an_axis_of_the_batch_itself_is_known_where_its_tensor_says_nothing() -> None:
    """Token types of zeros, T = B: the tensor is the same along both axes, its gradient is not."""
    torch.manual_seed(0)
    model = Net(words=nn.Embedding(9, 5), types=nn.Embedding(2, 5)).double()
    batch = {"words": torch.randint(9, (N, N)), "types": torch.zeros(N, N, dtype=torch.long)}

    def loss(m: nn.Module, b: object) -> Tensor:
        return (m.words(b["words"]) * m.types(b["types"])).sin().sum()

    shares = capture(model, batch, loss).shares
    one = [{name: t[i : i + 1] for name, t in batch.items()} for i in range(N)]
    for name, g in per_sample_gradients(lambda i: loss(model, one[i]), N, dict(model.named_parameters())).items():
        torch.testing.assert_close(shares[name].dense(), g)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_have_the_gradients_of_every_sample(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = Net(first=nn.Linear(6, 6), inner=nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))).double()
    x, parameters, engine = torch.randn(N, 3, 6).double(), dict(model.named_parameters()), TapeEngine()

    def losses(x: Tensor) -> Tensor:
        inner = checkpoint(model.inner, model.first(x), use_reentrant=reentrant)
        return model.inner(inner @ inner.mT @ x[..., :6]).sin().flatten(1).sum(1)

    with engine.tape(parameters, x, N) as tape:
        losses(x).sum().backward()
    probe = PermutationProbe(model, parameters, losses, x, N, 0)
    shares = engine.collect(tape, N, probe).shares
    for name, parameter in parameters.items():
        share, rows = shares[name].dense(), []
        torch.testing.assert_close(share.sum(0), parameter.grad)
        for i in range(N):
            model.zero_grad()
            losses(x[i : i + 1]).sum().backward()
            rows.append(parameter.grad.clone())
        model.zero_grad()
        torch.testing.assert_close(share, torch.stack(rows))
        losses(x).sum().backward()


def test_an_embedding_that_bounds_its_rows_has_the_gradients_of_every_sample() -> None:
    """`max_norm` changes rows in the forward pass, before they are read; what the optimizer sees comes after it."""
    torch.manual_seed(0)
    model = Net(table=nn.Embedding(7, 3, max_norm=0.5)).double()
    tokens = torch.randint(7, (N, 5))
    shares = capture(model, tokens, lambda m, t: m.table(t).sin().sum()).shares
    expected = per_sample_gradients(lambda i: model.table(tokens[i]).sin().sum(), N, {"w": model.table.weight})
    torch.testing.assert_close(shares["table.weight"].dense(), expected["w"])


def test_a_penalty_on_the_weights_is_named() -> None:
    model, x = Net(w=(6,)), torch.randn(N, 6)
    message = r"can't attribute `w`: the loss is computed from it by `\w+` .*Use the optimizer's `weight_decay`"
    with pytest.raises(UnattributableError, match=message):
        capture(model, x, lambda m, x: (x * m.w).sum() + m.w.square().sum())


def test_a_penalty_that_is_the_whole_loss_is_noticed() -> None:
    model = Net(w=(6,))
    with pytest.raises(UnattributableError, match=r"gradients of `w` .*don't add up to `.grad`"):
        capture(model, torch.randn(N, 6), lambda m, x: m.w.square().sum())


def test_a_constant_that_is_changed_after_a_derivation_is_noticed() -> None:
    model, x = Net(w=(5, 6)), torch.randn(N, 6)
    mask = torch.ones(5, 6)

    def loss(m: nn.Module, x: object) -> Tensor:
        value = F.linear(x, m.w + mask).sum()
        with torch.no_grad():
            mask.zero_()
        return value

    with pytest.raises(UnattributableError, match="combined with `w` before they met the batch was changed in place"):
        capture(model, x, loss)


def test_random_numbers_that_can_not_be_drawn_again_are_noticed() -> None:
    """A generator of the user's own is not restored; the second run must not be taken for the first."""
    model, x = Net(w=(6,)), torch.randn(N, 6)
    generator = torch.Generator().manual_seed(1)
    with pytest.raises(UnattributableError, match=r"`w`: use 0 .* draws random numbers that can't be drawn again"):
        capture(model, x, lambda m, x: torch.normal(x.expand(N, 6) * 0, m.w.exp(), generator=generator).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_small_gradient_is_measured_by_a_part_of_the_whole(dtype: torch.dtype) -> None:
    """What rounding leaves of a gradient that vanishes passes; what is more than that does not."""
    shares = MicroBatch(1, {"w": DenseShare(torch.zeros(1, 2, dtype=dtype))})
    unit = torch.finfo(dtype).eps
    noise, real = (torch.full((2,), k * unit, dtype=dtype) for k in (1, 1000))
    errors = sum_errors([shares], {"w": noise}, overall=1.0)
    check_sums(errors, {"w": noise})
    with pytest.raises(UnattributableError, match="`w`"):
        check_sums(sum_errors([shares], {"w": real}, overall=1.0), {"w": real})


def test_a_gradient_without_any_share_is_refused_however_small() -> None:
    gradient = torch.full((2,), 1e-12)
    errors = sum_errors([MicroBatch(1, {})], {"w": gradient, "v": torch.zeros(2)}, overall=1.0)
    assert errors == {"w": 1.0, "v": 0.0}
    with pytest.raises(UnattributableError, match=r"`w` \(relative error 1.0e\+00\)"):
        check_sums(errors, {"w": gradient, "v": torch.zeros(2)})


def test_gradients_of_complex_numbers_between_real_ones() -> None:
    torch.manual_seed(0)
    model = Net(filter=(N,), mix=(N, N, 2)).double()
    x = torch.randn(N, 2 * N - 2).double()

    def output(m: nn.Module, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(x) * m.filter
        return torch.fft.irfft(waves @ torch.view_as_complex(m.mix)).sin()

    shares = capture(model, x, lambda m, x: output(m, x).sum()).shares
    expected = per_sample_gradients(lambda i: output(model, x[i : i + 1]).sum(), N, dict(model.named_parameters()))
    for name, g in expected.items():
        torch.testing.assert_close(shares[name].dense(), g)


def test_an_embedding_with_sparse_gradients_beside_a_dense_use() -> None:
    torch.manual_seed(0)
    model = Net(table=nn.Embedding(7, 3, sparse=True)).double()
    tokens = torch.randint(7, (N, 5))
    shares = capture(model, tokens, lambda m, t: m.table(t).sin().sum()).shares
    expected = per_sample_gradients(lambda i: model.table(tokens[i]).sin().sum(), N, {"w": model.table.weight})
    torch.testing.assert_close(shares["table.weight"].dense(), expected["w"].to_dense())


def test_the_first_mixture_is_named() -> None:
    model = Net(lin=nn.Linear(6, 3))
    with pytest.raises(UnattributableError, match="the loss is computed from it by `add` in a way"):
        capture(model, torch.randn(N, 6), lambda m, x: (m.lin(x).sum() + m.lin.weight.norm()) / 2 * 3)


def drop_connect(w: Tensor) -> Tensor:
    return w * (torch.rand_like(w) < 0.5).to(w.dtype)


def factorised(w: Tensor) -> Tensor:
    first, second = torch.randn(w.shape[0]), torch.randn(w.shape[1])
    return w + w * torch.outer(first, second)


def in_place(w: Tensor) -> Tensor:
    return w + 0.1 * torch.empty_like(w).normal_()


def reparametrised(w: Tensor) -> Tensor:
    return torch.distributions.Normal(w, w.exp()).rsample()


@pytest.mark.parametrize(
    "noisy", [drop_connect, factorised, in_place, reparametrised], ids=lambda noisy: noisy.__name__
)
@pytest.mark.parametrize("n", [N, N + 1])
def test_noise_of_the_weights_is_that_of_all_samples_however_many_there_are(noisy, n: int) -> None:
    model, x = Net(w=(N, N)), torch.randn(n, N)

    def losses(module: nn.Module, data: Tensor) -> Tensor:
        torch.manual_seed(0)
        return F.linear(data, noisy(module.w)).square().sum(1)

    found = capture(model, x, lambda m, data: losses(m, data).sum(), n=n).shares["w"].dense()
    expected = per_sample_gradients(lambda i: losses(model, x)[i], n, dict(model.named_parameters()))["w"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n", [1, N])
def test_a_learned_scale_of_a_distribution(n: int) -> None:
    """`torch.distributions` stretches mean and scale by one function, of which one output has nothing tracked in it."""
    model, x = Net(layer=nn.Linear(5, 2), scale=(2,)), torch.randn(n, 5)
    target = torch.randn(n, 2)

    def losses(module: nn.Module, data: Tensor) -> Tensor:
        return -torch.distributions.Normal(module.layer(data), module.scale.exp()).log_prob(target[: len(data)]).sum(1)

    found = capture(model, x, lambda m, data: losses(m, data).sum(), n=n)
    expected = per_sample_gradients(lambda i: losses(model, x)[i], n, dict(model.named_parameters()))
    for name, share in expected.items():
        torch.testing.assert_close(found.shares[name].dense(), share)
    standing = Net(scale=(2,))
    found = capture(standing, target, lambda m, data: F.mse_loss(m.scale[None].expand(n, -1) * data, data), n=n)
    assert found.shares["scale"].dense().shape == (n, 2)


@pytest.mark.parametrize("division", [2.0, 4.0])  # the last cluster has two hidden features, or none
@pytest.mark.parametrize("classes", [[0, 1, 2, 1], [0, 4, 7, 8], [3, 3, 8, 8]])  # clusters without members, and all
def test_an_adaptive_softmax(classes: list[int], division: float) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors is a no-op")
        model = Net(
            first=nn.Linear(5, 8), head=nn.AdaptiveLogSoftmaxWithLoss(8, 9, [3, 6], div_value=division)
        ).double()
    x, y = torch.randn(N, 5).double(), torch.tensor(classes)
    shares = capture(model, (x, y), lambda m, b: m.head(m.first(b[0]), b[1]).loss).shares
    used = {name: p for name, p in model.named_parameters() if name in shares}
    assert {"first.weight", "head.head.weight"} <= used.keys()
    expected = per_sample_gradients(lambda i: -model.head(model.first(x), y).output[i] / N, N, used)
    for name, g in expected.items():
        torch.testing.assert_close(shares[name].dense(), g)
