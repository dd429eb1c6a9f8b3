"""docs/store-format.md says what the schema says, and its reader reads a trace without this package."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import zarr

from lightning_gradtrace.record import TopK
from lightning_gradtrace.store.durable import UNDER_WAY_BYTES
from lightning_gradtrace.store.schema import AXES, CHUNK_BYTES, ENCODING_TYPE, ENCODING_VERSION, MAX_CHUNK_BYTES
from lightning_gradtrace.store.target import MOST_DOCUMENT_BYTES
from lightning_gradtrace.store.writer import COMMIT_BYTES, COMMIT_SECONDS, COMMIT_SHARE, TraceWriter
from tests.docs.format_tables import PAGE, TABLES
from tests.docs.pages import ROOT, between, blocks
from tests.record.steps import make_step, record_steps
from tests.synthetic import write_trace


@pytest.mark.parametrize("mark", TABLES)
def test_tables_are_those_of_the_schema(mark: str) -> None:
    assert between(PAGE, mark) == TABLES[mark](), "`python -m tests.docs.format_tables` writes it anew"


def test_the_text_names_the_constants_of_the_code() -> None:
    text = " ".join((ROOT / PAGE).read_text(encoding="utf-8").split())
    assert text.startswith(f"# Store format {ENCODING_VERSION} ")
    assert f"`encoding-type` MUST be `{ENCODING_TYPE}`" in text
    assert "axes " + ", ".join(f"`{axis}`" for axis in AXES[:-1]) + f" and `{AXES[-1]}`" in text
    assert f"after {COMMIT_BYTES // 10**6} MB of raw rows, after {COMMIT_SECONDS:.0f} seconds" in text
    assert f"commits take {COMMIT_SHARE:.0%} of the writer's time".replace("%", " %") in text
    assert f"at most {UNDER_WAY_BYTES // 2**20} MiB of files are on their way" in text
    assert f"about {CHUNK_BYTES // 10**6} MB" in text and f"rows over {MAX_CHUNK_BYTES // 10**6} MB are split" in text
    assert f"the root document at most {MOST_DOCUMENT_BYTES // 2**20} MiB" in text
    queue = TraceWriter.__init__.__kwdefaults__["queue_bytes"]
    assert f"holds at most {queue // 2**20} MiB" in text


def test_the_reader_needs_zarr_alone_and_40_lines() -> None:
    (block,) = blocks(PAGE)
    imports = {
        alias.name for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert imports == {"json", "numpy", "zarr"}
    assert len(block.text.splitlines()) <= 40


def test_the_reader_returns_what_the_trace_returns(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "a.zarr", n_steps=12, batch=4, k=8, n_samples=18)
    (block,) = blocks(PAGE)
    page = block.run({})
    for step in trace.steps.index:
        frame = trace.topk.frame(steps=int(step))
        expected = zip(frame["sample_id"], frame["param"], frame["index"], frame["shift"], strict=True)
        assert page["read_topk"](tmp_path / "a.zarr", step) == [(i, p, n, float(s)) for i, p, n, s in expected]
    assert page["read_topk"](tmp_path / "a.zarr", 99) == []
    assert page["shapes"](tmp_path / "a.zarr") == dict(zip(trace.params["param"], trace.params["shape"], strict=True))
    zarr.create_group(tmp_path / "b.zarr")
    with pytest.raises(ValueError, match=r"b\.zarr is no trace of format 1"):
        page["read_topk"](tmp_path / "b.zarr", 0)


def test_the_reader_finds_the_rows_of_a_record_with_a_schedule(tmp_path: Path) -> None:
    steps = [make_step(number, [3, 2], [3, 4]) for number in range(5)]
    trace = record_steps(tmp_path / "a.zarr", [TopK(4, schedule=2)], steps)
    (block,) = blocks(PAGE)
    read_topk = block.run({})["read_topk"]
    for step in range(5):
        found = read_topk(tmp_path / "a.zarr", step)
        assert len(found) == (0 if step % 2 else 20)
        if found:
            frame = trace.topk.frame(steps=step)
            expected = zip(frame["sample_id"], frame["param"], frame["index"], frame["shift"], strict=True)
            assert found == [(i, p, n, float(s)) for i, p, n, s in expected]


def test_the_reader_ignores_rows_that_are_not_committed(tmp_path: Path) -> None:
    """Also when it looks at the arrays' own metadata, which are ahead of the root for the time of a commit."""
    trace = write_trace(tmp_path / "a.zarr", n_steps=4, batch=4)
    n = trace.n_occurrences
    root = zarr.open_group(tmp_path / "a.zarr", mode="r+")
    root.attrs["committed"] = {**root.attrs["committed"], "occurrence": n - 4}
    (block,) = blocks(PAGE)
    read_topk = block.run({})["read_topk"]
    assert len(read_topk(tmp_path / "a.zarr", 2)) == 4 * trace.topk.k
    assert read_topk(tmp_path / "a.zarr", 3) == []


def test_unknown_arrays_along_occurrences_are_accepted(tmp_path: Path) -> None:
    from lightning_gradtrace.store import ArraySpec, open_trace
    from tests.synthetic import Synthetic

    content = Synthetic(n_steps=2)
    spec = ArraySpec("mine/size", ("occurrence",), (), "float32", "something of an extension")
    out = TraceWriter(tmp_path / "a.zarr", params=content.params, specs=[spec], attrs={})
    for step in content.steps():
        n = len(step.occurrences["sample_id"])
        out.append_step(step.step, step.occurrences, {"mine/size": step.records["topk/shift"][:n, 0]})
    out.close(complete=True)
    trace = open_trace(tmp_path / "a.zarr")
    assert trace.verify().ok
    assert trace.array("mine/size").shape == (trace.n_occurrences,)
