"""All records of one real training, against the oracle and each other."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_gradtrace import Dense, Factored, GradTrace, Norms, Sketch, TopK, open_trace
from lightning_gradtrace.capture.oracle import per_sample_gradients
from lightning_gradtrace.record.outlook import look_ahead, readable, samples_per_step
from lightning_gradtrace.record.search import Searcher
from tests.record.steps import SHAPES, make_infos, make_step, record_steps
from tests.test_callback import Sentences, fit, make


def adamw(self):
    return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_records_tell_the_same_shifts(tmp_path: Path, optimizer: str, accumulate: int, monkeypatch) -> None:
    model = make(dropout=0.0)
    if optimizer == "adamw":
        monkeypatch.setattr(type(model), "configure_optimizers", adamw)
    records = [Dense(), Factored("factors"), Sketch(10**6), Norms(), TopK(30), TopK(20, per="step")]
    fit(model, GradTrace(tmp_path / "a.zarr", records, params="*"), accumulate_grad_batches=accumulate)
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.verify().ok, str(trace.verify())
    everyone = np.arange(trace.n_occurrences)
    total, square = np.zeros((len(everyone),) * 2), []
    for name in trace.params["param"]:
        shifts = np.asarray(trace.dense[name], np.float64)
        flat = shifts.reshape(len(shifts), -1)
        largest = np.abs(flat).max()
        np.testing.assert_allclose(trace.factored[name].shifts(everyone), shifts, rtol=1e-4, atol=1e-5 * largest)
        np.testing.assert_allclose(
            trace.norms.frame()[name], np.linalg.norm(flat, axis=1), rtol=1e-4, atol=1e-6 * largest
        )
        total += flat @ flat.T
        square.append(flat)
    np.testing.assert_allclose(
        trace.sketch.inner(everyone, everyone), total, rtol=1e-3, atol=1e-5 * np.abs(total).max()
    )
    every = np.concatenate(square, 1)
    kept = trace.topk.frame().groupby("occurrence")["shift"].apply(lambda s: np.sort(np.abs(s)).sum())
    np.testing.assert_allclose(kept, np.sort(np.abs(every), axis=1)[:, -30:].sum(1), rtol=1e-4)


def test_the_first_step_is_minus_rate_times_the_oracle(tmp_path: Path) -> None:
    model = make(dropout=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(
        model,
        GradTrace(tmp_path / "a.zarr", [Dense(), Factored()]),
        max_steps=1,
        max_epochs=None,
        gradient_clip_val=None,
    )
    trace = open_trace(tmp_path / "a.zarr")
    fresh = make(dropout=0.0)
    fresh.load_state_dict(before)
    data = Sentences()
    x, y = (torch.stack(part) for part in zip(*(data[i] for i in trace.occurrences["sample_id"]), strict=True))
    named = {name: p for name, p in fresh.named_parameters() if name in set(trace.params["param"])}
    expected = per_sample_gradients(
        lambda i: F.cross_entropy(fresh(x[i : i + 1])[0], y[i], reduction="sum") / y.numel(), len(x), named
    )
    for name, g in expected.items():
        shift = -0.5 * g.numpy()
        for found in (np.asarray(trace.dense[name]), trace.factored[name].shifts(range(len(x)))):
            np.testing.assert_allclose(found, shift, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k_step", [3, 10, 25, 60, 500])
@pytest.mark.parametrize("schedule", [None, 2])
def test_two_selections_share_what_they_find_and_keep_what_each_finds_alone(tmp_path: Path, k_step, schedule) -> None:
    steps = [make_step(number, [3, 2], [3, 4], gains=number == 2) for number in range(4)]
    both = record_steps(tmp_path / "a.zarr", [TopK(10, schedule=schedule), TopK(k_step, per="step")], steps)
    alone = record_steps(tmp_path / "b.zarr", [TopK(k_step, per="step")], steps)
    for name in ("occurrence", "index", "shift"):
        np.testing.assert_allclose(both.array(f"topk_step/{name}")[:], alone.array(f"topk_step/{name}")[:], rtol=1e-5)


def test_a_selection_of_a_step_searches_nothing_where_one_per_sample_knows_all(monkeypatch) -> None:
    step = make_step(0, [4], [3])
    infos = make_infos()
    first, second = TopK(10), TopK(10, per="step")
    for record in (first, second):
        record.arrays(infos)
    first.reduce(step, 0)
    monkeypatch.setattr(Searcher, "search", lambda *a: pytest.fail("it searched"))
    assert second.reduce(step, 0)["topk_step/index"].shape == (1, 10)


def test_the_run_says_what_it_will_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(make(), GradTrace(tmp_path / "a.zarr", TopK(50)), accumulate_grad_batches=2)
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("GradTrace: this run")]
    assert line.startswith("GradTrace: this run will write about ")
    assert f" in 6 steps to `{tmp_path / 'a.zarr'}`, where " in line and line.endswith(" are free")


def test_a_run_that_does_not_fit_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_gradtrace.record.outlook.free_bytes", lambda target: 1000)
    with pytest.warns(
        UserWarning, match=r"where 1.0 kB are free. Keep less \(a smaller k, `every_n_steps`, a schedule\)"
    ):
        fit(make(), GradTrace(tmp_path / "a.zarr", TopK(50)))


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    infos = make_infos()
    assert list(SHAPES) == [info.name for info in infos]
    endless = look_ahead("s3://bucket/a.zarr", infos, [Dense()], float("inf"), 4)
    assert endless.fits and endless.text.endswith(
        " per step to `s3://bucket/a.zarr`; the number of its steps is not known"
    )
    unsized = look_ahead(tmp_path / "no" / "a.zarr", infos, [Factored()], 10, None)
    assert "at most " in unsized.text and " per sample to " in unsized.text and " are free" in unsized.text
    assert readable(14_640_000_000) == "15 GB"
    loader = torch.utils.data.DataLoader(Sentences(), batch_size=5)
    assert samples_per_step(loader, 3) == 15 and samples_per_step(object()) is None


def test_training_is_the_same_with_all_records(tmp_path: Path) -> None:
    plain, traced = make(), make()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        torch.manual_seed(5)
        fit(plain)
        torch.manual_seed(5)
        fit(traced, GradTrace(tmp_path / "a.zarr", [Dense(), Factored(), Sketch(16), Norms()]))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, traced.state_dict()[name]), name
