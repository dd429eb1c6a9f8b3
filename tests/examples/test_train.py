"""A few steps of every experiment through `train`, and what they leave behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from examples.analyze import load_run
from examples.data import EnglishData
from lightning_gradtrace import open_trace
from tests.examples.conftest import Run

TINY = ["model.width=16", "model.hidden=16", "model.n_layers=1", "callbacks.gradtrace.record.k=10"]
TINY += ["trainer.max_epochs=1", "+trainer.limit_train_batches=3", "+trainer.limit_val_batches=1"]


@pytest.fixture(scope="module")
def english(run_experiment: Run) -> Path:
    return run_experiment("english", *TINY, "seed=7")


def test_run_directory_holds_trace_model_configuration_and_metrics(english: Path) -> None:
    written = {file.name for file in english.iterdir()}
    assert {"trace.zarr", "model.ckpt", "config.yaml", "commit.txt", "metrics.yaml"} <= written
    assert OmegaConf.load(english / "metrics.yaml").validation_perplexity > 1


def test_trace_keeps_the_resolved_configuration(english: Path) -> None:
    trace = open_trace(english / "trace.zarr")
    assert trace.attrs["complete"]
    assert trace.attrs["config"]["user"] == OmegaConf.to_container(OmegaConf.load(english / "config.yaml"))
    assert trace.attrs["config"]["user"]["seed"] == 7


def test_sample_ids_are_item_numbers_and_texts_are_the_items(english: Path) -> None:
    trace = open_trace(english / "trace.zarr")
    assert trace.occurrences["sample_id"].tolist() == list(range(60))
    data = EnglishData(min_count=2)
    data.setup()
    items = np.stack([data.datasets["train"][i][0] for i in range(60)])
    assert np.array_equal(trace.inputs(np.arange(60)), items)
    assert trace.text(3) == " ".join(data.vocabulary.words[n] for n in items[3])


def test_trained_model_is_loaded_back(english: Path) -> None:
    cfg, model = load_run(english)
    assert not model.training
    assert model.network.embedding.weight.shape[1] == cfg.model.width == 16
    assert model.network.head.bias.detach().abs().max() > 0


def test_same_seed_gives_the_same_weights(english: Path, run_experiment: Run) -> None:
    _, model = load_run(english)
    _, again = load_run(run_experiment("english", *TINY, "seed=7"))
    _, other = load_run(run_experiment("english", *TINY, "seed=8"))
    weights, same, different = (m.network.head.weight for m in (model, again, other))
    assert weights.equal(same)
    assert not weights.equal(different)


def test_shuffled_batches_are_recorded_under_their_item_numbers(run_experiment: Run) -> None:
    run = run_experiment("planted", *TINY, "data.shuffle=true", "data.n_documents=40")
    ids = open_trace(run / "trace.zarr").occurrences["sample_id"].to_numpy()
    assert len(set(ids.tolist())) == len(ids) == 60
    assert not np.array_equal(ids, np.sort(ids))


def test_wikitext2_trains_and_tests_on_local_files(run_experiment: Run, tmp_path: Path) -> None:
    for name, n_lines in {"train": 300, "valid": 100, "test": 100}.items():
        text = "".join(f"the {name} split has line {i} , and it is short .\n" for i in range(n_lines))
        (tmp_path / f"{name}.txt").write_text(text)
    run = run_experiment("wikitext2", *TINY, f"data.root={tmp_path}")
    assert {"validation_perplexity", "test_perplexity"} <= set(OmegaConf.load(run / "metrics.yaml"))


def test_unfinished_run_is_named_by_the_analysis(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(
        FileNotFoundError, match=r"lacks \['metrics.yaml', 'model.ckpt', 'trace.zarr'\]; expected the run"
    ):
        load_run(tmp_path)
