"""Files that go to the disk past the page cache hold what others hold, and where that can't be done nothing is lost."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradtrace.store import direct
from lightning_gradtrace.store.direct import BLOCK, DirectFiles

UNIT = 2 * BLOCK


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "LEAST_BYTES", 1)
    monkeypatch.setattr(direct, "BUFFER_BYTES", UNIT)


def parts_of(sizes: list[int], seed: int = 0) -> list[bytes | memoryview]:
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(0, 256, size, np.uint8) for size in sizes]
    return [a.tobytes() if number % 2 else memoryview(a) for number, a in enumerate(arrays)]


def written_directly(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the length of every direct write, on systems that have none too: a flag that changes nothing stands in."""
    lengths: list[int] = []
    write_at = direct._write_at

    def record(descriptor: int, data: memoryview, offset: int) -> None:
        lengths.append(len(data))
        write_at(descriptor, data, offset)

    monkeypatch.setattr(direct, "_write_at", record)
    monkeypatch.setattr(direct, "_FLAG", os.O_NOCTTY)
    return lengths


@given(
    sizes=st.lists(st.sampled_from([0, 1, 4, 160, BLOCK - 1, BLOCK, BLOCK + 1, UNIT - 1, UNIT, UNIT + 3]), max_size=9)
)
@settings(max_examples=60, deadline=None)
def test_a_file_holds_its_parts_however_long_they_are(sizes, tmp_path_factory):
    parts = parts_of(sizes)
    path = tmp_path_factory.mktemp("a") / "a.bin"
    DirectFiles().write(path, parts)
    assert path.read_bytes() == b"".join(parts)


def test_whole_blocks_are_written_and_the_file_ends_where_it_should(tmp_path, monkeypatch):
    lengths = written_directly(monkeypatch)
    DirectFiles().write(tmp_path / "a.bin", parts_of([5, UNIT, 100]))
    assert lengths == [UNIT, BLOCK] and (tmp_path / "a.bin").stat().st_size == UNIT + 105


def test_small_files_go_through_the_page_cache(tmp_path, monkeypatch):
    lengths = written_directly(monkeypatch)
    monkeypatch.setattr(direct, "LEAST_BYTES", 1000)
    files = DirectFiles()
    files.write(tmp_path / "a.bin", parts_of([600, 399]))
    files.write(tmp_path / "b.bin", parts_of([600, 400]))
    assert lengths == [BLOCK]


def test_many_threads_share_the_memory(tmp_path, monkeypatch):
    written_directly(monkeypatch)
    files, contents = DirectFiles(), [parts_of([UNIT * 3 + n, 7, n], seed=n) for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: files.write(tmp_path / str(n), contents[n]), range(40)))
    assert all((tmp_path / str(n)).read_bytes() == b"".join(parts) for n, parts in enumerate(contents))
    assert 1 <= len(files._free) <= 8


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("call", ["open", "first write", "later write"])
def test_where_the_system_refuses_the_file_is_written_all_the_same(call, code, tmp_path, monkeypatch):
    lengths = written_directly(monkeypatch)
    open_file, write, calls = os.open, os.pwrite, []

    def refuse(path, flags, *rest):
        if call == "open" and flags & direct._FLAG:
            raise OSError(code, "no")
        return open_file(path, flags, *rest)

    def refuse_write(descriptor, data, offset):
        calls.append(offset)
        if call != "open" and (call == "first write" or offset):
            raise OSError(code, "no")
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "pwrite", refuse_write)
    files, parts = DirectFiles(), parts_of([UNIT, UNIT, 17])
    files.write(tmp_path / "a.bin", parts)
    tried = len(lengths)
    files.write(tmp_path / "b.bin", parts)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes() == b"".join(parts)
    assert len(lengths) == tried == {"open": 0, "first write": 1, "later write": 2}[call], "it isn't tried again"


def test_a_write_that_stops_early_is_gone_on_with(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: write(descriptor, data[:BLOCK], offset))
    parts = parts_of([UNIT, UNIT, 17])
    DirectFiles().write(tmp_path / "a.bin", parts)
    assert (tmp_path / "a.bin").read_bytes() == b"".join(parts)


def test_a_full_disk_is_said_and_the_memory_comes_back(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    lengths = written_directly(monkeypatch)
    files = DirectFiles()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            files.write(tmp_path / "a.bin", parts_of([UNIT]))
    assert len(files._free) == 1
    files.write(tmp_path / "b.bin", parts_of([UNIT]))
    assert lengths == [UNIT] * 2, "a full disk is no reason to go through the page cache"


def test_a_system_that_writes_nothing_and_gives_no_reason_is_an_error(tmp_path, monkeypatch):
    written_directly(monkeypatch)
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="wrote nothing"):
        DirectFiles().write(tmp_path / "a.bin", parts_of([UNIT]))


def test_no_memory_for_direct_writes_is_no_error(tmp_path, monkeypatch):
    def none_left(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    written_directly(monkeypatch)
    monkeypatch.setattr(direct.mmap, "mmap", none_left)
    DirectFiles().write(tmp_path / "a.bin", parts_of([UNIT, 3]))
    assert (tmp_path / "a.bin").read_bytes() == b"".join(parts_of([UNIT, 3]))


def test_a_forked_process_does_not_write_into_the_memory_of_this_one(tmp_path, monkeypatch):
    written_directly(monkeypatch)
    files = DirectFiles()
    files.write(tmp_path / "first", parts_of([UNIT]))
    (memory,) = files._free
    before = bytes(memory)
    child = os.fork()
    if not child:
        try:
            files.write(tmp_path / "child", parts_of([UNIT], seed=1))
        finally:
            os._exit(0)  # whatever happens: this is no second run of the tests
    assert os.waitpid(child, 0)[1] == 0
    assert bytes(memory) == before and (tmp_path / "child").read_bytes() != before


def test_systems_without_direct_writes(tmp_path: Path, monkeypatch):
    lengths = written_directly(monkeypatch)
    monkeypatch.setattr(direct, "_FLAG", 0)  # what Python says where there is no O_DIRECT
    DirectFiles().write(tmp_path / "a.bin", [b"x" * UNIT])
    assert (tmp_path / "a.bin").read_bytes() == b"x" * UNIT and not lengths
