"""Random numbers of the step: the samples' own keep no axis in doubt, shared ones go to no sample alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_gradtrace.capture.engines.tape import TapeEngine
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.capture.placing.placement import UnattributableError
from lightning_gradtrace.capture.probing.probe import PermutationProbe
from tests.capture.probing.noises import LENGTH, ORDINARY, SHARED, WIDTH, Training, layers, net, out, scored, squares
from tests.capture.test_attribution import Net, capture

N = 4


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def n_equal(model: nn.Module, training: Training, engine: TapeEngine, n: int, built_for: int, seed: int) -> int:
    """Capture one step, compare it with autograd, sample by sample, and return of how many parameters."""
    x = torch.randn(n, LENGTH, WIDTH)

    def losses(module: nn.Module, data: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return training.run(module, data, built_for)

    def loss(module: nn.Module, data: Tensor) -> Tensor:
        return losses(module, data).sum()

    shares = capture(model, x, loss, engine, n).shares
    expected = per_sample_gradients(lambda i: losses(model, x)[i], n, dict(model.named_parameters()))
    for name, wanted in expected.items():
        torch.testing.assert_close(shares[name].dense(), wanted, msg=lambda text, name=name: f"{name}: {text}")
    return len(expected)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("training", [*ORDINARY, *SHARED], ids=lambda training: training.name)
def test_every_step_is_split_as_autograd_splits_it(training: Training, n: int) -> None:
    torch.manual_seed(0)
    built_for = max(n, 2)
    model, engine = Net(**training.parts(built_for)), TapeEngine()
    for seed in range(3):
        assert n_equal(model, training, engine, n, built_for, seed) > 0
    assert n_equal(model, training, engine, n + 3, built_for, 3) > 0
    if n > 2:
        assert n_equal(model, training, engine, n - 1, built_for, 4) > 0
    assert bool(engine.sharing.shared) == (training in SHARED and n > 1)
    # Of one sample nothing is asked, of the larger batch once, and one of two that is taken twice may not tell.
    assert n <= 2 or not engine.sharing.doubtful


def test_without_random_numbers_a_pass_over_as_many_samples_is_read_once_from_the_fourth_on() -> None:
    model, engine = Net(**layers()), TapeEngine()
    for _ in range(3):
        assert engine.tape({}, torch.ones(N, 1), N).aside is not None
        capture(model, torch.randn(N, WIDTH), lambda m, x: squares(m.first(x)).sum(), engine)
    assert engine.tape({}, torch.ones(N, 1), N).aside is None
    assert engine.tape({}, torch.ones(N + 1, 1), N + 1).aside is not None


def test_a_draw_without_influence_is_asked_about_again() -> None:
    """The last layer of what is told the time begins with zeros, as in diffusion transformers."""

    def run(m: nn.Module, x: Tensor, n: int) -> Tensor:
        return squares(m.out((m.first(x) * (1 + m.time(torch.rand(len(x), 1)))[:, None]).tanh()))

    torch.manual_seed(0)
    model, engine = Net(**layers(time=net(1, 5, WIDTH), out=out())), TapeEngine()
    training = Training("zeros", run, layers)
    for parameter in model.time[-1].parameters():
        nn.init.zeros_(parameter)
    for seed in range(2):
        assert n_equal(model, training, engine, N, N, seed) > 0
        assert engine.sharing.doubtful and not engine.sharing.own
    nn.init.normal_(model.time[-1].weight)
    assert n_equal(model, training, engine, N, N, 2) > 0
    assert engine.sharing.own and not engine.sharing.shared and not engine.sharing.doubtful


def test_a_draw_that_never_has_an_influence_counts_as_shared_in_the_end() -> None:
    def run(m: nn.Module, x: Tensor, n: int) -> Tensor:
        return squares(m.first(x) + m.time(torch.rand(n, 1)).mean(0))  # their mean is the same in any order

    torch.manual_seed(0)
    model, engine = Net(**layers(time=net(1, 5, WIDTH))), TapeEngine()
    for seed in range(4):
        assert n_equal(model, Training("mean", run, layers), engine, N, N, seed) > 0
        assert bool(engine.sharing.doubtful) == (seed < 2)
    assert engine.sharing.shared


def test_numbers_that_are_shared_here_and_the_samples_own_there_are_refused() -> None:
    def run(m: nn.Module, x: Tensor, n: int) -> Tensor:
        words = m.table(torch.randint(n, (n,)))
        return (m.first(x).mean(1) @ words.T).logsumexp(1) + squares(x.mean(1) * words)

    model = Net(**layers(table=nn.Embedding(N, WIDTH)))
    with pytest.raises(
        UnattributableError, match=r"meet the random numbers of `randint` in .*test_draws\.py:"
    ) as caught:
        assert n_equal(model, Training("both ways", run, layers), TapeEngine(), N, N, 0) > 0
    assert "shared in one place, and the samples' own in another" in str(caught.value)


def test_shared_numbers_that_are_first_drawn_in_a_later_step_are_refused() -> None:
    late = False

    def run(m: nn.Module, x: Tensor, n: int) -> Tensor:
        words = m.table(torch.randint(n, (n,))) if late else m.table.weight
        return (m.first(x).mean(1) @ words.T).logsumexp(1)

    model, engine = Net(**layers(table=nn.Embedding(N, WIDTH))), TapeEngine()
    training = Training("late", run, layers)
    for seed in range(3):
        assert n_equal(model, training, engine, N, N, seed) > 0
    late = True
    with pytest.raises(
        UnattributableError, match="Begin the trace at a step that does, draw them in a line of their own"
    ):
        n_equal(model, training, engine, N, N, 1)


@pytest.mark.parametrize("read_aside", [True, False])
def test_numbers_that_were_the_samples_own_and_come_to_be_shared(read_aside: bool) -> None:
    """The same line draws a word for each sample at first, and later words that all samples are told from."""
    shared = False

    def run(m: nn.Module, x: Tensor, n: int) -> Tensor:
        h, words = m.first(x).mean(1), m.table(torch.randint(n, (n,)))
        return scored(h, words) if shared else squares(h * words)

    torch.manual_seed(0)
    model, engine = Net(**layers(table=nn.Embedding(N, WIDTH))), TapeEngine()
    training = Training("turns", run, layers)
    for seed in range(2 if read_aside else 3):
        assert n_equal(model, training, engine, N, N, seed) > 0
    assert engine.sharing.own and not engine.sharing.shared
    shared = True
    if not read_aside:
        with pytest.raises(UnattributableError, match="no captured step before drew them, or used them as this one"):
            n_equal(model, training, engine, N, N, 3)
    for seed in range(3):
        assert n_equal(model, training, engine, N, N, seed) > 0
    shared = False
    assert n_equal(model, training, engine, N, N, 3) > 0


def joined_by_cat(h: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([h, words]).chunk(2)  # type: ignore[return-value]


def joined_by_stack(h: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    return torch.stack([h, words]).unbind()  # type: ignore[return-value]


def joined_by_writing(h: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    both = h.new_zeros(2 * len(h), h.shape[1])
    both[: len(h)], both[len(h) :] = h, words
    return both[: len(h)], both[len(h) :]


@pytest.mark.parametrize("join", [joined_by_cat, joined_by_stack, joined_by_writing])
@pytest.mark.parametrize("shared", [False, True])
def test_numbers_that_are_joined_with_the_samples(shared: bool, join: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Their rows stay where they were, whether all samples share them or not; the loss tells."""

    def run(m: nn.Module, x: Tensor, n: int) -> Tensor:
        h, words = join(m.first(x).mean(1), m.table(torch.randint(n, (n,))))
        return scored(h, words) if shared else squares(h * words)

    torch.manual_seed(0)
    model, engine = Net(**layers(table=nn.Embedding(N, WIDTH))), TapeEngine()
    for seed in range(3):
        if shared:
            with pytest.raises(UnattributableError, match=r"can't attribute `(first|table).weight`"):
                n_equal(model, Training("joined", run, layers), engine, N, N, seed)
        else:
            assert n_equal(model, Training("joined", run, layers), engine, N, N, seed) > 0


@pytest.mark.parametrize("n", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("by", [1, -1])
def test_codes_that_meet_the_neighbour_of_their_row(by: int, n: int) -> None:
    """Whatever order tells whose numbers are must not be one that a shift keeps."""

    def run(m: nn.Module, x: Tensor, n: int) -> Tensor:
        return squares(m.time(torch.randn(len(x), 1)).roll(by, 0) - x.mean(1))

    torch.manual_seed(0)
    model, engine = Net(time=net(1, 5, WIDTH)), TapeEngine()
    for seed in range(3):
        assert n_equal(model, Training("neighbours", run, layers), engine, n, n, seed) > 0


def test_what_is_only_looked_at_is_no_new_use(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ask = PermutationProbe.influence
    monkeypatch.setattr(PermutationProbe, "influence", lambda self, sites: asked.append(sites) or ask(self, sites))
    n_steps = 0

    def run(m: nn.Module, x: Tensor, n: int) -> Tensor:
        drawn = torch.rand(len(x), 1)
        time = m.time(drawn)
        if n_steps > 2:
            (time.detach() * 2).norm(dim=1)
            drawn.mean()
            with torch.no_grad():
                time.square().sum(1)
        return squares(m.first(x) + time[:, None])

    model, engine = Net(**layers(time=net(1, 5, WIDTH))), TapeEngine()
    for n_steps in range(6):
        assert n_equal(model, Training("looked at", run, layers), engine, N, N, n_steps) > 0
    assert len(asked) == 1


def test_nothing_is_asked_again_about_numbers_that_are_used_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    ask = PermutationProbe.influence
    monkeypatch.setattr(PermutationProbe, "influence", lambda self, sites: asked.append(sites) or ask(self, sites))

    def run(m: nn.Module, x: Tensor, n: int) -> Tensor:
        noise = torch.rand(len(x), x.shape[1], 1)
        steps = [m.time(noise[:, t]) for t in range(x.shape[1])]
        return squares(m.first(x) + torch.stack(steps, 1))

    torch.manual_seed(0)
    model, engine = Net(**layers(time=net(1, 5, WIDTH))), TapeEngine()
    for n in (N, N, N + 3, N + 5, N):
        capture(model, torch.randn(n, 2, WIDTH), lambda m, x: run(m, x, N).sum(), engine, n)
    assert len(asked) == 1


def test_a_step_that_can_not_be_run_again_is_refused_if_parameters_meet_its_random_numbers_first() -> None:
    runs = 0

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if runs > 1:
            raise OSError("the file was read to its end")
        return squares(m.first(torch.randn(N, WIDTH))).sum()

    with pytest.raises(
        UnattributableError, match=r"run again to find out, .* \(OSError: the file was read to its end\)"
    ):
        capture(Net(**layers()), torch.randn(N, WIDTH), loss)


def test_a_helper_that_draws_is_told_by_those_who_call_it() -> None:
    def draw(*shape: int) -> Tensor:
        return torch.rand(shape)

    def run(m: nn.Module, x: Tensor, n: int) -> Tensor:
        h = m.first(x).mean(1) + m.time(draw(len(x), 1))
        return (h @ m.time(draw(n, 1)).T).logsumexp(1)

    torch.manual_seed(0)
    model, engine = Net(**layers(time=net(1, 5, WIDTH))), TapeEngine()
    for seed in range(3):
        assert n_equal(model, Training("helper", run, layers), engine, N, N, seed) > 0
    assert len(engine.sharing.own) == len(engine.sharing.shared) == 1


def test_draws_in_training_only_are_asked_about_in_training() -> None:
    def run(m: nn.Module, x: Tensor, n: int) -> Tensor:
        kept = (torch.rand(n, 1) < 0.5).to(x.dtype) if m.training else 1.0
        return squares(nn.functional.embedding((x[..., 0] * 9).long() % n, m.rows * kept))

    model = Net(rows=(N, WIDTH))
    assert n_equal(model, Training("training", run, layers), TapeEngine(), N, N, 0) > 0
    assert model.training


@pytest.mark.parametrize("caches", [False, True])
def test_draws_that_the_probe_does_not_see_as_the_step_did(caches: bool) -> None:
    """Beside NumPy's noise, which is not played again; or words that are drawn in the first step alone, and kept."""
    torch.manual_seed(0)
    model, engine, met = Net(**layers(table=nn.Embedding(N, WIDTH))), TapeEngine(), []

    def losses(m: nn.Module, x: Tensor, noise: Tensor, words: Tensor) -> Tensor:
        return scored(m.first(x * noise).mean(1), m.table(words))

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        noise = torch.ones(N, 1, 1) if caches else torch.from_numpy(np.random.rand(N, 1, 1))
        if not caches:
            words = torch.randint(N, (N,))
        elif not hasattr(m, "words"):
            words = m.words = torch.randint(N, (N,))
        else:
            words = m.words
        met.append((noise, words))
        return losses(m, x, noise, words).sum()

    for _ in range(4):
        x, n_met = torch.randn(N, 3, WIDTH), len(met)
        shares = capture(model, x, loss, engine).shares
        expected = per_sample_gradients(
            lambda i: losses(model, x, *met[n_met])[i],  # noqa: B023
            N,
            dict(model.named_parameters()),
        )
        for name, wanted in expected.items():
            torch.testing.assert_close(shares[name].dense(), wanted)


def test_a_layer_that_draws_is_told_by_the_step_that_calls_it() -> None:
    class Sampler(nn.Module):
        def forward(self, n: int) -> Tensor:
            return torch.rand(n, 1)

    sampler = Sampler()

    def run(m: nn.Module, x: Tensor, n: int) -> Tensor:
        h = m.first(x).mean(1) + m.time(sampler(len(x)))
        return scored(h, m.time(sampler(n)))

    torch.manual_seed(0)
    model, engine = Net(**layers(time=net(1, 5, WIDTH))), TapeEngine()
    for seed in range(3):
        assert n_equal(model, Training("sampler", run, layers), engine, N, N, seed) > 0
    assert len(engine.sharing.own) == len(engine.sharing.shared) == 1


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_what_is_compiled_beside_the_parameters_is_read_once() -> None:
    @torch.compile(backend="eager")
    def scaled(x: Tensor) -> Tensor:
        return x * 2 + 1

    model, engine = Net(**layers()), TapeEngine()
    for seed in range(2):
        assert (
            n_equal(
                model, Training("compiled", lambda m, x, n: squares(m.first(scaled(x))), layers), engine, N, N, seed
            )
            > 0
        )


class Seeds:
    """Draws with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def test_generators_of_the_users_own() -> None:
    def run(seeds: Seeds, m: nn.Module, x: Tensor, n: int) -> Tensor:
        y = m.first(torch.cat([x, x + seeds(*x.shape)])).tanh()
        return squares(y.unflatten(0, (2, -1)).diff(dim=0)[0])

    torch.manual_seed(0)
    model, engine, seeds = Net(**layers()), TapeEngine(), Seeds()
    for _ in range(2):
        x, state = torch.randn(N, LENGTH, WIDTH), seeds.generator.get_state()
        losses = functools.partial(run, seeds)
        found = capture(model, x, lambda m, data: losses(m, data, N).sum(), engine).shares  # noqa: B023

        def loss_of(i: int) -> Tensor:
            seeds.generator.set_state(state)  # noqa: B023
            return losses(model, x, N)[i]  # noqa: B023

        expected = per_sample_gradients(loss_of, N, dict(model.named_parameters()))
        for name, wanted in expected.items():
            torch.testing.assert_close(found[name].dense(), wanted)
