"""TokenGrads in a real Trainer: its rows are the shifts of single loss tokens, and training stays as it was."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_gradtrace import GradTrace, TokenGrads, TopK, open_trace
from lightning_gradtrace.capture.placing.placement import UnattributableError
from tests.test_callback import LENGTH, VOCAB, Model, fit, make

PARAMETER = "encoder.layers.0.linear1.weight"
N_ENTRIES = 96


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_shifts_of_all_loss_tokens_add_up_to_those_of_the_occurrence(options: dict, tmp_path: Path) -> None:
    plain = make(momentum=0.9)
    fit(plain, **options)
    path = tmp_path / "a.zarr"
    records = [TopK(N_ENTRIES), TokenGrads(k=N_ENTRIES, slots=LENGTH)]
    model = make(momentum=0.9)
    fit(model, GradTrace(path, records, params=PARAMETER), **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    trace = open_trace(path)
    assert trace.verify().ok
    expected = trace.topk.frame().pivot_table("shift", "occurrence", "index").to_numpy()
    found = trace.token_grads.frame().pivot_table("shift", "occurrence", "index", "sum").to_numpy()
    assert found.shape == expected.shape == (trace.n_occurrences, N_ENTRIES)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    tokens = trace.token_grads.tokens()
    assert len(tokens) == trace.n_occurrences * LENGTH
    assert (tokens["n_chosen"] == LENGTH).all()


def test_chosen_words_are_kept_with_their_largest_shifts(tmp_path: Path) -> None:
    vocab = [f"w{i}" for i in range(VOCAB)]
    path, everything = tmp_path / "few.zarr", tmp_path / "all.zarr"
    for where, record in (
        (path, TokenGrads(["w3", "w4", "w5"], k=7, slots=2)),
        (everything, TokenGrads(k=N_ENTRIES, slots=LENGTH)),
    ):
        fit(make(), GradTrace(where, record, params=PARAMETER, vocab=vocab), max_epochs=1)
    few, dense = open_trace(path), open_trace(everything)
    tokens = few.token_grads.tokens()
    assert len(tokens) and set(tokens["token"]) <= {3, 4, 5}
    whole = dense.token_grads.frame()
    seen = whole.drop_duplicates(["occurrence", "position"])
    wanted = seen[seen["token"].isin([3, 4, 5])].groupby("occurrence").head(2)
    np.testing.assert_array_equal(tokens[["occurrence", "position"]], wanted[["occurrence", "position"]])
    by_token = {key: part for key, part in whole.groupby(["occurrence", "position"])}
    for key, part in few.token_grads.frame(steps=[0, 2]).groupby(["occurrence", "position"]):
        reference = by_token[key]
        largest = reference.iloc[np.sort(np.argsort(-reference["shift"].abs().to_numpy(), kind="stable")[:7])]
        np.testing.assert_array_equal(part["index"], largest["index"])
        np.testing.assert_array_equal(part["shift"], largest["shift"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, r"TokenGrads\(k=0\).*at least 1"),
        ({"slots": 0}, r"TokenGrads\(slots=0\).*at least 1"),
        ({"by": "position"}, "expected one of `target`, `input`"),
        ({"tokens": []}, "expected at least one token"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenGrads(**arguments)


def test_words_need_a_vocabulary_that_has_them() -> None:
    record = TokenGrads(["(", ")"])
    with pytest.raises(ValueError, match="there is no vocabulary"):
        record.choice(None)
    with pytest.raises(ValueError, match=r"\['\)'\] are not in the vocabulary of 2 tokens"):
        record.choice(["(", "a"])
    assert record.choice(["(", "a", ")"]).tokens == (0, 2)


def test_the_functional_engine_has_no_loss_tokens(tmp_path: Path) -> None:
    callback = GradTrace(tmp_path / "a.zarr", TokenGrads(), engine="functional", per_sample_loss=lambda m, b: None)
    with pytest.raises(ValueError, match="expected `engine='tape'`"):
        fit(make(), callback)


class Checkpointed(Model):
    reentrant = False

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.embedding(tokens)
        for layer in self.encoder.layers:
            hidden = checkpoint(layer, hidden, mask, None, True, use_reentrant=self.reentrant)
        return self.head(hidden)


def test_checkpointed_layers_have_the_same_loss_tokens(tmp_path: Path) -> None:
    frames = []
    for kind in (Model, Checkpointed):
        pl.seed_everything(3, verbose=False)
        path = tmp_path / f"{kind.__name__}.zarr"
        fit(kind(dropout=0.0), GradTrace(path, TokenGrads(k=5, slots=LENGTH), params=PARAMETER), max_epochs=1)
        frames.append(open_trace(path).token_grads.frame())
    columns = ["occurrence", "position", "index"]
    np.testing.assert_array_equal(frames[0][columns], frames[1][columns])
    np.testing.assert_allclose(frames[0]["shift"], frames[1]["shift"], rtol=1e-3, atol=1e-9)
    assert frames[0]["shift"].any()


def test_layers_that_run_a_backward_pass_of_their_own_are_refused(tmp_path: Path) -> None:
    """Nothing of what happens in them would be seen; nothing that is tracked stands before them here."""
    model = Checkpointed()
    model.reentrant = True
    with pytest.raises(UnattributableError, match="checkpoints activations with `use_reentrant=True`"):
        fit(model, GradTrace(tmp_path / "a.zarr", TokenGrads(), params=PARAMETER))


def test_layers_that_run_a_backward_pass_of_their_own_may_stand_before_what_is_tracked(tmp_path: Path) -> None:
    frames = []
    for reentrant in (True, False):
        pl.seed_everything(3, verbose=False)
        model, path = Checkpointed(dropout=0.0), tmp_path / f"{reentrant}.zarr"
        model.reentrant = reentrant
        fit(model, GradTrace(path, TokenGrads(k=5, slots=LENGTH), params=["head.weight"]), max_epochs=1)
        frames.append(open_trace(path).token_grads.frame())
    assert frames[0].equals(frames[1]) and frames[0]["shift"].any()


def test_a_trace_without_the_record_says_so(tmp_path: Path) -> None:
    fit(make(), GradTrace(tmp_path / "a.zarr", TopK(3)), fast_dev_run=1)
    with pytest.raises(AttributeError, match="holds no TokenGrads record; it holds: topk"):
        _ = open_trace(tmp_path / "a.zarr").token_grads


def test_several_backward_passes_of_one_batch_are_refused(tmp_path: Path) -> None:
    class Twice(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            for _ in range(2):
                self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    pl.seed_everything(3, verbose=False)
    with pytest.raises(ValueError, match="2 backward passes went through the forward pass of one batch, expected one"):
        fit(Twice(), GradTrace(tmp_path / "a.zarr", TokenGrads(), params=PARAMETER), gradient_clip_val=None)
