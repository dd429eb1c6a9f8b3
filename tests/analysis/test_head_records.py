"""Head shifts of a real training: every record says the same, and it is what slices of the shifts say."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_gradtrace import Dense, Factored, GradTrace, TokenGrads, TopK, Trace, open_trace
from lightning_gradtrace.analysis import attention_heads, head_shifts, weight_change
from tests.models import VOCAB, Research
from tests.test_callback import LENGTH, fit, make


class ResearchModel(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        pl.seed_everything(0, verbose=False)
        self.attn = Research()

    def forward(self, tokens):
        return self.attn(tokens)

    def training_step(self, batch, batch_idx):
        x, y = (one % VOCAB for one in batch)
        return F.cross_entropy(self(x).flatten(0, 1), y.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


PACKED = {
    "query": lambda w: w["in_proj_weight"][..., 0:8, :],
    "key": lambda w: w["in_proj_weight"][..., 8:16, :],
    "value": lambda w: w["in_proj_weight"][..., 16:24, :],
    "output": lambda w: np.swapaxes(w["out_proj.weight"], -1, -2),
}


def slices(trace: Trace, module: str, head: int, part: str, weights: dict[str, np.ndarray]) -> np.ndarray:
    """One head's part of weights (..., *shape), cut out by hand: two heads of four features."""
    if module == "attn":
        return weights[f"attn.W_{part[0].upper()}"][..., head, :, :]
    own = {name.removeprefix(f"{module}."): weight for name, weight in weights.items() if name.startswith(module)}
    return PACKED[part](own)[..., 4 * head : 4 * head + 4, :]


@pytest.fixture(scope="module", params=["packed", "einsum"])
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path: Path = tmp_path_factory.mktemp("heads") / "a.zarr"
    packed = request.param == "packed"
    model, params = (make(), "*self_attn*weight") if packed else (ResearchModel(), "attn.W_[QKVO]")
    k = 512 if packed else 256  # everything
    records = [TopK(k), Dense(), Factored(), TokenGrads(k=k, slots=LENGTH)]
    fit(model, GradTrace(path, records, params=params, weights_every_n_steps=2), max_epochs=1, gradient_clip_val=None)
    return open_trace(path)


def heads_of(trace: Trace):
    return attention_heads(trace, 2)


def test_every_record_equals_slices_of_the_dense_shifts(trace: Trace) -> None:
    change, names = weight_change(trace), list(trace.params["param"])
    dense = {name: trace.dense[name].shifts(np.arange(trace.n_occurrences)) for name in names}
    for record in ("topk", "dense", "factored"):
        found = head_shifts(trace, heads_of(trace), along=change, record=record)
        assert len(found) == trace.n_occurrences * len(heads_of(trace))
        for row in found.itertuples():
            shift = slices(trace, row.module, row.head, row.part, dense)[row.occurrence].astype(float)
            direction = slices(trace, row.module, row.head, row.part, change)
            expected = (np.abs(shift).sum(), (shift**2).sum(), (shift * direction).sum())
            scale = np.abs(shift * direction).sum()
            assert (row.size, row.square) == pytest.approx(expected[:2], rel=1e-4)
            assert row.along == pytest.approx(expected[2], rel=1e-4, abs=1e-4 * scale)
            assert row.toward == max(row.along, 0)
            assert row.sample_id == trace.occurrences["sample_id"][row.occurrence]


def test_loss_tokens_add_up_to_their_occurrence_along_a_direction(trace: Trace) -> None:
    change = weight_change(trace)
    whole = head_shifts(trace, heads_of(trace), along=change, record="dense")
    tokens = head_shifts(trace, heads_of(trace), along=change, record="token_grads")
    keys = ["occurrence", "module", "head", "part"]
    summed = tokens.groupby(keys)["along"].sum()
    expected = whole.set_index(keys)["along"].sort_index()
    np.testing.assert_allclose(summed[expected.index], expected, rtol=1e-3, atol=1e-4 * expected.abs().max())
    assert set(tokens["position"]) == set(range(LENGTH))
    some = head_shifts(trace, heads_of(trace), slice(1, 2), along=change, record="token_grads")
    assert some.equals(tokens[tokens["step"].between(1, 2)].reset_index(drop=True))
