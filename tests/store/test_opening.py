"""What may be written where, what may be opened, and what the errors say. Nothing but a trace is ever removed."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore, MemoryStore, ZipStore

from lightning_gradtrace.store import StoreError, TraceWriter, open_trace
from tests.synthetic import Synthetic, write_trace


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def edit_root(path: Path, **attributes: object) -> None:
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"] |= attributes
    (path / "zarr.json").write_text(json.dumps(root))


def test_trace_is_not_replaced_unasked(tmp_path):
    write_trace(tmp_path / "a.zarr", n_steps=3)
    before = snapshot(tmp_path)
    message = (
        r"a\.zarr` already holds a trace \(complete, 3 steps\); pass overwrite=True to replace it, or choose another"
    )
    with pytest.raises(StoreError, match=message):
        write_trace(tmp_path / "a.zarr")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("old", [{"per": "both", "weight_steps": (0,)}, {"complete": False}, {"n_steps": 0}])
def test_overwrite_replaces_a_trace_without_a_rest(tmp_path, old):
    write_trace(tmp_path / "a.zarr", **old)
    write_trace(tmp_path / "a.zarr", n_steps=4, writer={"overwrite": True})
    write_trace(tmp_path / "b.zarr", n_steps=4)
    assert snapshot(tmp_path / "a.zarr") == snapshot(tmp_path / "b.zarr")


def test_overwrite_leaves_files_that_are_not_of_the_trace(tmp_path):
    write_trace(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "notes.txt").write_text("mine")
    (tmp_path / "a.zarr" / "figures").mkdir()
    (tmp_path / "a.zarr" / "figures" / "1.png").write_bytes(b"mine")
    write_trace(tmp_path / "a.zarr", writer={"overwrite": True})
    assert (tmp_path / "a.zarr" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "a.zarr" / "figures" / "1.png").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["..", "../precious", ".", "", "/", "absolute", "precious/x", "precious", "a.zarr"])
def test_overwrite_follows_no_path_out_of_the_trace(tmp_path, name):
    path = tmp_path / "a.zarr"
    write_trace(path, n_steps=1)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "zarr.json").write_text("mine")
    (path / "mine.txt").write_text("mine")
    root = json.loads((path / "zarr.json").read_text())
    root["consolidated_metadata"]["metadata"][str(tmp_path / "precious") if name == "absolute" else name] = {}
    (path / "zarr.json").write_text(json.dumps(root))
    os.symlink(tmp_path / "precious", path / "precious")
    write_trace(path, n_steps=1, writer={"overwrite": True})
    assert (tmp_path / "precious" / "zarr.json").read_text() == "mine"
    assert (path / "mine.txt").read_text() == "mine"


def test_overwriting_that_is_cut_off_leaves_a_readable_trace(tmp_path, monkeypatch):
    path = tmp_path / "a.zarr"
    write_trace(path)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_gradtrace.store.commit.remove_groups", killed)
    with pytest.raises(KeyboardInterrupt):
        write_trace(path, writer={"overwrite": True})
    trace = open_trace(path)
    assert trace.n_steps == 0 and trace.verify().ok and not trace.attrs["complete"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_directory_with_other_files_is_left_alone(tmp_path, overwrite):
    (tmp_path / "model.ckpt").write_bytes(b"weights")
    message = (
        r"holds files that are not a trace, such as `model.ckpt`; it is left as it is, also with overwrite=True: choose"
    )
    with pytest.raises(StoreError, match=message):
        write_trace(tmp_path, writer={"overwrite": overwrite})
    assert snapshot(tmp_path) == {"model.ckpt": b"weights"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_zarr_group_is_left_alone(tmp_path, overwrite):
    zarr.create_group(tmp_path / "a.zarr").create_array("x", shape=(3,), dtype="f4")
    before = snapshot(tmp_path)
    with pytest.raises(StoreError, match=r"holds a Zarr hierarchy that is not a trace; it is left as it is"):
        write_trace(tmp_path / "a.zarr", writer={"overwrite": overwrite})
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_file_in_the_way_is_left_alone(tmp_path, overwrite):
    (tmp_path / "a.zarr").write_text("mine")
    with pytest.raises(
        StoreError, match=r"a\.zarr` exists and is a file, expected a directory or nothing; choose another"
    ):
        write_trace(tmp_path / "a.zarr", writer={"overwrite": overwrite})
    assert (tmp_path / "a.zarr").read_text() == "mine"


def test_target_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StoreError, match=r"file/a\.zarr` can't be written: NotADirectoryError: .*; choose another path or"
    ):
        write_trace(tmp_path / "file" / "a.zarr")

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lightning_gradtrace.store.durable.DurableLocalStore.write", refuse)
    with pytest.raises(StoreError, match=r"a\.zarr` can't be written: PermissionError: .*Permission denied"):
        write_trace(tmp_path / "a.zarr")


def test_empty_directory_may_be_used(tmp_path):
    assert write_trace(tmp_path).n_steps == 10


def test_read_only_store_and_zip_are_refused(tmp_path):
    with pytest.raises(StoreError, match="is open read-only; expected a writable zarr Store"):
        write_trace(LocalStore(tmp_path, read_only=True))
    for target in (tmp_path / "a.zip", ZipStore(tmp_path / "a.zip", mode="w")):
        with pytest.raises(
            StoreError, match="is a zip file, in which nothing can be replaced; write a directory and pack"
        ):
            write_trace(target)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"does not exist; expected the directory of a trace"),
        ("file", r"is not a directory; expected the directory of a trace"),
        ({}, r"is not a trace: found no `zarr.json` in it, expected a Zarr group whose `encoding-type` is `gradtrace`"),
        ({"zarr.json": b"\xff{"}, r"is not a trace: found a `zarr.json` that can't be read, expected a Zarr group"),
        ({"zarr.json": b"[1]"}, r"is not a trace: found a `zarr.json` that can't be read, expected a Zarr group"),
        (
            {"zarr.json": b'{"attributes": {"encoding-type": "anndata"}}'},
            r"found `encoding-type` 'anndata', expected a",
        ),
        ({"zarr.json": b'{"attributes": {}}'}, r"found `encoding-type` None, expected a Zarr group whose"),
    ],
)
def test_what_is_not_a_trace_is_told_so(tmp_path, content, message):
    path = tmp_path / "a.zarr"
    if content == "file":
        path.write_text("x")
    elif content is not None:
        path.mkdir()
        for name, data in content.items():
            (path / name).write_bytes(data)
    with pytest.raises(StoreError, match=r"a\.zarr` " + "(is not a trace: )?" + message):
        open_trace(path)


@pytest.mark.parametrize("version", ["2.0", "17.3", "x", None])
def test_newer_format_asks_for_an_upgrade(tmp_path, version):
    write_trace(tmp_path / "a.zarr")
    edit_root(tmp_path / "a.zarr", **{"encoding-version": version})
    message = rf"was written by format {version}, this package reads up to 1.x: upgrade lightning-gradtrace"
    with pytest.raises(StoreError, match=message):
        open_trace(tmp_path / "a.zarr")


def test_later_minor_version_is_read(tmp_path):
    write_trace(tmp_path / "a.zarr")
    edit_root(tmp_path / "a.zarr", **{"encoding-version": "1.7"})
    assert open_trace(tmp_path / "a.zarr").verify().ok


@pytest.mark.parametrize(("version", "hint"), [("1.1", False), ("1.3", False), ("1.999", True), ("1.x", False)])
def test_what_a_later_minor_version_may_have_changed_asks_for_an_upgrade(version, hint, tmp_path):
    write_trace(tmp_path / "a.zarr")
    text = (tmp_path / "a.zarr" / "zarr.json").read_text()
    (tmp_path / "a.zarr" / "zarr.json").write_text(text.replace('"separator":"."', '"separator":"-"'))
    edit_root(tmp_path / "a.zarr", **{"encoding-version": version})
    with pytest.raises(StoreError, match=r"has damaged metadata: .* expected `default` with") as caught:
        open_trace(tmp_path / "a.zarr")
    assert ("it has format 1.999, this package knows 1.3: upgrade lightning-gradtrace" in str(caught.value)) == hint


def test_damaged_root_is_one_clear_error(tmp_path):
    write_trace(tmp_path / "a.zarr")
    root = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    root["consolidated_metadata"]["metadata"]["topk/index"]["shape"] = "many"
    (tmp_path / "a.zarr" / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(StoreError, match=r"a\.zarr` has damaged metadata: "):
        open_trace(tmp_path / "a.zarr")


def test_every_kind_of_target_holds_the_same_trace(tmp_path):
    expected = write_trace(tmp_path / "a.zarr").topk.frame()
    targets = [str(tmp_path / "b.zarr"), f"file://{tmp_path}/c.zarr", "memory://store-test/d.zarr"]
    for target in [*targets, MemoryStore(), LocalStore(tmp_path / "e.zarr")]:
        trace = write_trace(target, writer={"overwrite": True})
        assert trace.topk.frame().equals(expected) and trace.verify().ok
        with pytest.raises(StoreError, match="already holds a trace"):
            write_trace(target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr", "b.zarr", "c.zarr", "e.zarr"]


def test_packed_trace_is_read(tmp_path):
    expected = write_trace(tmp_path / "a.zarr").topk.frame()
    shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "a.zarr")
    trace = open_trace(tmp_path / "a.zip")
    assert trace.topk.frame().equals(expected) and trace.verify().ok
    trace.store.close()


def test_missing_parts_are_named_with_what_there_is(make_trace):
    trace = make_trace(inputs=False)
    for kind in ("dense", "factored", "sketch", "norms"):
        with pytest.raises(AttributeError, match=rf"this trace holds no {kind.capitalize()} record; it holds: topk"):
            getattr(trace, kind)
    with pytest.raises(AttributeError, match=r'this trace holds no TopK\(per="step"\) record; it holds: topk'):
        trace.topk_step  # noqa: B018
    with pytest.raises(KeyError, match="this trace holds no inputs; record them with inputs='auto' or a callable"):
        trace.inputs([1])
    with pytest.raises(KeyError, match="this trace holds no vocabulary; record it with vocab="):
        trace.text(1)
    with pytest.raises(
        KeyError, match=r"no weights of `layers.0.linear1.weight` in this trace, which has 0 snapshots; record"
    ):
        trace.weights("layers.0.linear1.weight")
    with pytest.raises(
        KeyError, match=r"`x` is no tracked parameter of this trace; it holds: layers.0.linear1.weight, "
    ):
        trace.param("x")
    with pytest.raises(KeyError, match=re.escape("steps [99] are not in the trace; it holds 10 steps, 0 to 9")):
        trace.topk.frame([3, 99])
    with pytest.raises(IndexError, match="entries 3 to 85 were asked for; the trace has 0 to 84"):
        trace.entries(np.array([3, 85]))
    with pytest.raises(KeyError, match="holds no array `topk/nothing`; it holds: "):
        trace.array("topk/nothing")
    assert trace.tokens()[0].shape == (0,) and trace.vocab is None


def test_unknown_sample_and_snapshot_are_named(make_trace):
    trace = make_trace(weight_steps=(0, 4))
    with pytest.raises(KeyError, match=re.escape("no inputs of samples [77] in this trace, which holds 18 samples")):
        trace.inputs([3, 77])
    with pytest.raises(KeyError, match=re.escape("no snapshot before step 3; there are snapshots before steps [0, 4]")):
        trace.weights("layers.0.linear1.weight", 3)


def test_a_list_of_snapshots_that_was_taken_away_is_damage(make_trace, tmp_path):
    make_trace(weight_steps=(0, 4))
    root = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    del root["consolidated_metadata"]["metadata"]["weights/step"]
    (tmp_path / "a.zarr" / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(
        StoreError, match="is damaged: `weights/step` is missing, although rows of its group are committed"
    ):
        open_trace(tmp_path / "a.zarr").weights("layers.0.linear1.weight")


def test_attributes_that_json_cannot_hold_are_named(tmp_path):
    content = Synthetic()
    for attrs, message in (
        ({"config": {"model": [object()]}}, r"`attrs.config.model\[0\]` is a object; expected what JSON can hold"),
        ({"complete": True}, r"`attrs` has \['complete'\], which the writer sets itself; expected other names"),
    ):
        with pytest.raises(ValueError, match=message):
            TraceWriter(tmp_path / "a.zarr", params=content.params, specs=[], attrs=attrs)
    assert not (tmp_path / "a.zarr").exists()


def test_params_that_do_not_number_the_entries_are_named(tmp_path):
    params = Synthetic().params
    for wrong, message in (
        (params.drop(columns="kind"), r"`params` has the columns .*; \['kind'\] missing, expected"),
        (
            params.assign(offset=[0, 31, 60]),
            r"`layers.0.linear2.weight` of shape \(5, 6\) has numel=30 and offset=31; exp",
        ),
        (params.assign(numel=[30, 30, 24]), r"`layers.0.out_proj.weight` of shape \(5, 5\) has numel=24 and offset=60"),
    ):
        with pytest.raises(ValueError, match=message):
            TraceWriter(tmp_path / "a.zarr", params=wrong, specs=[], attrs={})
    assert not (tmp_path / "a.zarr").exists()


@pytest.mark.parametrize(("column", "values"), [("numel", [30, 30, -(2**62)]), ("offset", [0, 31, 60])])
def test_stored_params_that_do_not_number_the_entries_are_damage(column, values, make_trace, tmp_path):
    make_trace()
    array = zarr.open_group(tmp_path / "a.zarr", mode="r+", use_consolidated=False)[f"params/{column}"]
    array[:] = np.array(values)
    with pytest.raises(
        StoreError, match=r"`params/` is damaged: `layers.*` of shape .* expected numel=\d+ and offset="
    ):
        open_trace(tmp_path / "a.zarr").topk.frame()
