"""`verify` is clean on a good trace and names what is wrong with a bad one."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import zarr

from lightning_gradtrace.store import TraceWriter, open_trace
from tests.synthetic import Synthetic, write_trace


def problems(path: Path, **options: object) -> str:
    report = open_trace(path).verify(**options)
    assert report.ok == (not report.problems)
    return str(report)


def change(path: Path, array: str, value: object, *place: object) -> None:
    group = zarr.open_group(path, mode="r+")
    group[array][place] = value


@pytest.fixture
def path(tmp_path):
    write_trace(tmp_path / "a.zarr", per="both", chunk_rows=5, weight_steps=(0, 5))
    return tmp_path / "a.zarr"


def test_good_trace_has_no_problems(path):
    report = open_trace(path).verify()
    assert report.ok and not report.notes and report.n_steps == 10 and report.n_chunks > 30
    assert str(report).endswith("no problems")


def test_flipped_bit_is_named_with_its_steps(path):
    chunk = path / "topk" / "shift" / "c.2.0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    text = problems(path)
    assert (
        "`topk/shift` chunk 2/0 (occurrence 10 to 14, steps 2 to 3) can't be read: ValueError: Stored and computed"
        in text
    )
    trace = open_trace(path)
    assert len(trace.array("topk/shift")[:10]) == 10 and len(trace.topk_step.frame(0)) == 9


@pytest.mark.parametrize("array", ["topk/index", "steps/loss", "occurrences/slot", "params/numel", "inputs/length"])
def test_missing_chunk_is_named(path, array):
    chunk = next((path / array).glob("c.*"))
    chunk.unlink()
    assert f"`{array}` chunk {chunk.name.removeprefix('c.').replace('.', '/')} (" in problems(path)
    assert " is missing" in problems(path)


def test_missing_metadata_of_an_array_is_named(path):
    (path / "topk" / "shift" / "zarr.json").unlink()
    (problem,) = open_trace(path).verify().problems
    assert problem == "`topk/shift/zarr.json` is missing: other readers can't open the array by itself"


def test_damage_anywhere_is_seen(path):
    chunks = sorted(file for file in path.rglob("*") if file.is_file() and file.name != "zarr.json")
    for file in random.Random(0).sample(chunks, 8):
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert not open_trace(path).verify().ok, file
        file.write_bytes(data)
    assert open_trace(path).verify().ok


@pytest.mark.parametrize(
    "array, place, value, message",
    [
        ("topk/index", (7, 5), 85, "`topk/index` row 7 has entries beyond the last one, 84"),
        ("topk/index", (7, slice(0, 2)), [3, 3], "`topk/index` of occurrence 7 is not in rising order"),
        ("topk_step/index", (4, 8), 99, "`topk_step/index` row 4 has entries beyond the last one, 84"),
        ("topk_step/occurrence", (4, 0), 0, "`topk_step/occurrence` of step 4 names occurrences of other steps"),
        ("topk_step/occurrence", (4, 3), -1, "`topk_step/occurrence` of step 4 has padding before kept entries"),
        ("topk_step/occurrence", (1, slice(0, 2)), [7, 4], "`topk_step/index` of step 1 is not in rising order of occ"),
        ("occurrences/step", (4,), 9, "occurrence 4 names step 9, its place is in step 1"),
        ("steps/step", (3,), 1, "`steps/step` does not rise after row 2 (step 2)"),
        ("steps/n_occurrences", (3,), 3, "steps count 35 occurrences, the trace has 36"),
        ("steps/residual", (5,), 0.2, "ledger residual of 1 steps is above 0.001, largest 0.2 at step 5"),
        ("steps/residual", (5,), np.inf, "ledger residual of 1 steps is above 0.001, largest inf at step 5"),
        ("steps/sum_error", (5,), 0.3, "sum of shares against .grad of 1 steps is above 0.001, largest 0.3 at step 5"),
        ("params/kind", (0,), "norm", "the params table does not match `params_digest`"),
        ("params/offset", (1,), 29, "`params/` is damaged: `layers.0.linear2.weight` of shape (5, 6)"),
    ],
)
def test_numbers_that_do_not_fit_are_named(path, array, place, value, message):
    change(path, array, value, *place)
    assert message in problems(path)


def test_ledger_tolerance_is_an_argument(path):
    change(path, "steps/residual", 0.2, 5)
    assert open_trace(path).verify(residual_tolerance=0.5).ok


def test_array_shorter_than_the_commit_mark_is_named(path):
    root = json.loads((path / "zarr.json").read_text())
    root["consolidated_metadata"]["metadata"]["topk/shift"]["shape"][0] = 20
    (path / "zarr.json").write_text(json.dumps(root))
    assert "`topk/shift` has 20 rows, the commit mark promises 36 along `occurrence`" in problems(path)


def test_kept_entries_that_are_not_finite_and_killed_runs_are_notes(path):
    change(path, "steps/nonfinite", 3, 5)
    report = open_trace(path).verify()
    assert report.ok and "3 kept entries in 1 steps are NaN or infinite, first step 5" in report.notes[0]
    stopped = write_trace(path, n_steps=1, complete=False, writer={"overwrite": True})
    assert stopped.verify().ok and "the run did not end normally: stopped by the test" in stopped.verify().notes


def test_padding_of_a_small_step_is_no_problem(tmp_path):
    content = Synthetic(per="step", k_step=9)
    writer = TraceWriter(tmp_path / "a.zarr", params=content.params, specs=content.specs(), attrs={})
    one = np.zeros(1, np.int32)
    occurrence = np.array([[0, 0, -1, -1, -1, -1, -1, -1, -1]])
    index = np.array([[3, 8, 0, 0, 0, 0, 0, 0, 0]], np.uint32)
    records = {"topk_step/occurrence": occurrence, "topk_step/index": index}
    records["topk_step/shift"] = np.zeros((1, 9), np.float32)
    writer.append_step({"step": 0}, {"micro_batch": one, "slot": one, "rank": one, "sample_id": one}, records)
    writer.close(complete=True)
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.verify().ok, str(trace.verify())
    assert trace.topk.frame()["index"].tolist() == [3, 8]
    assert [len(block) for block in trace.topk.blocks()] == [2]


def write_steps(path: Path, residual: list[float], rounding: float = 1e-6, attrs: dict | None = None):
    content = Synthetic(n_steps=len(residual))
    writer = TraceWriter(path, params=content.params, specs=content.specs(), attrs=attrs or {})
    for step, value in zip(content.steps(), residual, strict=True):
        writer.append_step({**step.step, "residual": value, "rounding": rounding}, step.occurrences, step.records)
    writer.close(complete=True)
    return open_trace(path).verify()


def test_a_residual_out_of_line_is_a_note_with_its_usual_cause(tmp_path):
    report = write_steps(tmp_path / "a.zarr", [1e-6, 2e-6, 5e-4, 1e-6, 1e-6, float("nan"), 2e-6])
    assert report.ok
    (note,) = report.notes
    assert "residual of 1 steps is out of line with the others (median 1.5e-06), largest 0.0005 at step 2" in note
    assert "something else that moves weights at that moment: averaging, pruning or resetting them" in note


def test_what_rounding_of_the_weights_leaves_is_no_problem(tmp_path):
    """A learning rate of 1e-8 moves weights by less than they can hold."""
    assert write_steps(tmp_path / "a.zarr", [0.3, 0.2, 0.3, 0.2, 0.4], rounding=0.5).ok
    report = write_steps(tmp_path / "b.zarr", [0.3, 0.2, 0.3, 0.2, 0.4], rounding=0.01)
    assert "ledger residual of 5 steps is above 0.001, largest 0.4 at step 4. In most steps" in report.problems[0]


def test_the_optimizers_rule_says_what_residual_to_expect(tmp_path):
    muon = {"class": "torch.optim._muon.Muon", "rule": "Muon", "residual_tolerance": {"single": 0.7, "half": 0.7}}
    assert write_steps(tmp_path / "a.zarr", [0.3] * 5, attrs={"optimizer": [muon]}).ok
    unknown = {"class": "mine.Lion", "rule": None, "residual_tolerance": {"single": 1e-3, "half": 0.2}}
    report = write_steps(tmp_path / "b.zarr", [0.3] * 5, attrs={"optimizer": [unknown]})
    assert "The optimizer `Lion` has no rule, so that shifts are -lr * clipped gradient" in report.problems[0]
    half = {"optimizer": [unknown], "config": {"trainer": {"precision": "bf16-mixed"}}}
    assert write_steps(tmp_path / "c.zarr", [0.1] * 5, attrs=half).ok
    assert write_steps(tmp_path / "d.zarr", [1e-6] * 5, attrs={"optimizer": ["?", {"residual_tolerance": 3}]}).ok
