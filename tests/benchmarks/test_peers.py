"""Every peer of the benchmarks takes the steps of plain training, so that times are those of the same work."""

from __future__ import annotations

import warnings
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning

from benchmarks.peers import PEERS, NotAvailable
from benchmarks.scaling import AXES, scaled
from benchmarks.timing import fit
from benchmarks.workloads import TINY, Setting, Training


def weights(make) -> list[torch.Tensor]:
    """Train and return the weights at the end, but for biases of keys: their gradients are nothing but rounding."""
    kept: list[pl.LightningModule] = []

    def made():
        kept.append(make())
        return kept[0], []

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # opacus, on the tokens
        warnings.filterwarnings("ignore", "In CPU autocast")  # opacus, inside torch.func
        warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
        assert fit(made, Setting(TINY, steps=2)) > 0
    return [p.detach() for name, p in sorted(kept[0].network.named_parameters()) if not name.endswith("key.bias")]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_takes_the_same_steps_as_plain_training(name: str, optimizer) -> None:
    found = weights(lambda: PEERS[name](TINY, optimizer))
    expected = weights(lambda: Training(TINY, optimizer))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in PEERS if "opacus" in name or "dattri" in name])
def test_a_peer_that_does_not_know_a_model_says_so(name: str) -> None:
    with pytest.raises(NotAvailable, match="MultiheadAttention"):
        PEERS[name](replace(TINY, reference=True), "sgd")


@pytest.mark.parametrize("axis", AXES)
def test_scaling_changes_one_size_and_leaves_a_model_that_can_be_built(axis: str) -> None:
    workload, k = scaled(TINY, 100, axis, 2.0)
    assert (k if axis == "k" else getattr(workload, axis)) == (200 if axis == "k" else 2 * getattr(TINY, axis))
    tokens = torch.zeros(workload.batch, workload.length, dtype=torch.long)
    assert workload.network()(tokens).shape == (workload.batch, workload.length, workload.vocabulary)
