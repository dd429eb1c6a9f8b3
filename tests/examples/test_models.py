"""The reference network is what docs/concepts.md, 6 says."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from examples.models import LanguageModel, ReferenceTransformer
from examples.models.language_model import batch_first_logits
from examples.models.transformer import PositionEncoding


@pytest.fixture(scope="module")
def small() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(n_tokens=13, width=8, n_heads=2, hidden=6, n_layers=2).eval()


def test_reference_has_the_parameters_of_the_experiment() -> None:
    network = ReferenceTransformer(n_tokens=28_782)
    inside = dict(network.encoder.named_parameters())
    assert sum(p.numel() for p in network.parameters()) == 12_267_582
    assert sum(p.numel() for p in inside.values()) == 726_000
    assert sum(p.numel() for p in inside.values() if p.ndim == 2) == 720_000
    assert not any(layer.norm_first for layer in network.encoder.layers)


def test_embedding_and_head_start_within_a_tenth_and_the_bias_at_zero() -> None:
    network = ReferenceTransformer(n_tokens=50)
    for weight in (network.embedding.weight, network.head.weight):
        assert weight.abs().max() <= 0.1
        assert weight.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert not network.head.bias.any()


def test_position_encoding_pairs_sines_with_cosines_of_the_same_angle() -> None:
    table = PositionEncoding(200, dropout=0.0).table[:35, 0].double()
    torch.testing.assert_close(table[:, 0::2] ** 2 + table[:, 1::2] ** 2, torch.ones(35, 100).double())
    assert table[3, 0] == pytest.approx(torch.sin(torch.tensor(3.0)).item())
    assert table[3, 1] == pytest.approx(torch.cos(torch.tensor(3.0)).item())


def test_no_prediction_sees_a_later_token(small: LanguageModel) -> None:
    tokens = torch.randint(13, (7, 3))
    other = tokens.clone()
    other[4:] = (other[4:] + 1) % 13
    torch.testing.assert_close(small(tokens)[:4], small(other)[:4])
    assert not torch.allclose(small(tokens)[4:], small(other)[4:])


def test_columns_do_not_mix_and_batch_first_logits_are_the_same_numbers(small: LanguageModel) -> None:
    tokens = torch.randint(13, (3, 7))
    together = batch_first_logits(small, tokens)
    assert together.shape == (3, 7, 13)
    torch.testing.assert_close(together[1:2], batch_first_logits(small, tokens[1:2]))


def test_training_loss_is_the_token_mean_and_perplexity_its_exponential(small: LanguageModel) -> None:
    tokens, targets = torch.randint(13, (7, 3)), torch.randint(13, (7, 3))
    loss = F.cross_entropy(small(tokens).reshape(-1, 13), targets.reshape(-1))
    small.perplexity.reset()
    small.perplexity.update(small(tokens), targets)
    assert small.perplexity.compute().item() == pytest.approx(loss.exp().item(), rel=1e-5)


def test_default_optimizer_is_the_reference_schedule(small: LanguageModel) -> None:
    (optimizer,), (schedule,) = small.configure_optimizers()
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["lr"] == 5.0
    optimizer.step()
    schedule.step()
    assert schedule.get_last_lr() == [pytest.approx(4.75)]


def test_checkpoint_loads_without_running_code_from_it(small: LanguageModel, tmp_path: Path) -> None:
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    trainer.strategy.connect(small)
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)
    again = LanguageModel(**saved["hyper_parameters"])
    again.load_state_dict(saved["state_dict"])
    tokens = torch.randint(13, (7, 3))
    assert torch.equal(again.eval()(tokens), small(tokens))
