"""Commands that need the model: where it comes from, and what is done with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_gradtrace import analysis, open_trace
from tests.analysis.test_components import SHAPES, Attentive
from tests.analysis.traces import write_trace
from tests.cli.conftest import Run

CHAIN = ("--min-count", 5, "--entries", 20)
COLUMNS = {
    "neurons": "notable_flip_rate",
    "controls": "control_value",
    "pooled": "control_value",
    "layers": "notable_share",
    "effects": "loss_change",
    "flips": "proportion",
    "losses": "ablated_loss",
}


@pytest.mark.parametrize("show", COLUMNS)
def test_ablate_shows_every_table(show: str, run: Run, trace_path: Path, model_file: Path) -> None:
    done = run("ablate", trace_path, "--model", f"{model_file}:build", *CHAIN, "--neurons", 1, "--show", show, "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert COLUMNS[show] in document["columns"] and document["rows"]


def test_ablate_equals_the_library_and_the_way_of_calling_does_not_matter(
    run: Run, trace_path: Path, model_file: Path
) -> None:
    spec = (*CHAIN, "--neurons", 1, "--json", "--model-arg", 3)
    one, other = (
        json.loads(run("ablate", trace_path, "--model", f"{model_file}:{name}", *spec).stdout)["rows"]
        for name in ("build", "positions_first")
    )
    assert one == other
    trace = open_trace(trace_path)
    entries = analysis.frequent_entries(trace, 20)
    neurons = analysis.neurons(trace, entries, analysis.notable_tokens(trace, entries, min_count=5))
    few = neurons[(neurons["n_samples"] <= 18) & (neurons["n_notable"] > 0)].head(1)
    assert [(row["param"], row["neuron"]) for row in one] == list(zip(few["param"], few["neuron"], strict=True))


@pytest.mark.parametrize("show", COLUMNS)
def test_single_entries_are_switched_off_too(show: str, run: Run, trace_path: Path, model_file: Path) -> None:
    spec = ("--model", f"{model_file}:build", *CHAIN, "--neurons", 2, "--by", "entry", "--samples", 9)
    done = run("ablate", trace_path, *spec, "--show", show, "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert COLUMNS[show] in document["columns"] and document["rows"]
    assert ("index" in document["columns"]) == (show not in ("layers", "pooled"))


@pytest.mark.parametrize("by", ["head", "head_part"])
def test_heads_and_their_controls_equal_the_library(by: str, run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    text = {sample: rng.integers(0, 12, 6).tolist() for sample in range(12)}
    sample_id = np.arange(24).reshape(-1, 4) % 12
    index = np.sort(np.stack([rng.permutation(8)[:2] * 24 + sample // 6 * 8 for sample in sample_id.flat]), axis=1)
    trace = write_trace(SHAPES, sample_id, index, text=text, to=tmp_path / "h.zarr")
    spec = ("--model", "tests.analysis.test_components:Attentive", "--by", by, "--heads", 4, "--max-share", 1)
    spec += ("--entries", 20, "--min-count", 2, "--neurons", 2, "--show", "controls", "--json")
    torch.manual_seed(0)
    done = run("ablate", tmp_path / "h.zarr", *spec)
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    torch.manual_seed(0)
    model, heads, entries = Attentive(), analysis.attention_heads(trace, 4), analysis.frequent_entries(trace, 20)
    words = analysis.notable_tokens(trace, entries, min_count=2, by=by, heads=heads)
    few = analysis.components(trace, entries, words, by, heads=heads)
    few = few[few["n_notable"] > 0].head(2)
    expected = analysis.peer_control(trace, model, few, entries, heads=heads, n_samples=500)
    got = [row for row in rows if row["control"] == by]
    assert [row["head"] for row in got] == expected["head"].tolist()
    np.testing.assert_allclose([row["value"] for row in got if row["value"] is not None], expected["value"].dropna())
    missing = run("ablate", tmp_path / "h.zarr", "--model", "tests.analysis.test_components:Attentive", "--by", by)
    assert missing.exit_code == 2 and "the number of heads of `attn`" in missing.stderr
    wrong = run("ablate", tmp_path / "h.zarr", "--by", "layer")
    assert wrong.exit_code == 2 and "`layer` is none of neuron, head, head_part, entry" in wrong.stderr


@pytest.mark.parametrize(("extra", "column"), [((), "rank_high"), (("--top",), "both")])
def test_activations(extra: tuple[str, ...], column: str, run: Run, trace_path: Path, model_file: Path) -> None:
    done = run("activations", trace_path, "--model", f"{model_file}:build", *CHAIN, "--neurons", 1, "--json", *extra)
    assert done.exit_code == 0, done.stderr
    assert column in json.loads(done.stdout)["columns"]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (None, "this needs the trained model: write --model package.module:function"),
        ("nonsense", "`nonsense` names no function"),
        ("{file}:absent", "has no function `absent`"),
        ("{file}:nothing", "returned NoneType, expected a torch.nn.Module or (model, forward)"),
        ("/no/such.py:build", "there is no file `/no/such.py`"),
    ],
)
def test_a_model_that_can_not_be_had_is_a_usage_error(
    spec: str | None, text: str, run: Run, trace_path: Path, model_file: Path
) -> None:
    given = () if spec is None else ("--model", spec.format(file=model_file))
    done = run("ablate", trace_path, *given)
    assert done.exit_code == 2
    assert " ".join(text.split()) in " ".join(done.stderr.split())


def test_a_module_that_is_not_there_is_named(run: Run, trace_path: Path) -> None:
    done = run("ablate", trace_path, "--model", "no_such_module:build")
    assert done.exit_code == 4 and "No module named 'no_such_module'" in done.stderr


def test_thresholds_that_leave_nothing_say_what_to_change(run: Run, trace_path: Path, model_file: Path) -> None:
    done = run("ablate", trace_path, "--model", f"{model_file}:build", "--min-count", 10**6)
    assert done.exit_code == 2 and "lower --min-count or --min-relative" in done.stderr
