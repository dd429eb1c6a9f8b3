"""What may stand in the place of a file: no pipe, device, link or endless file makes reading hang or swell."""

from __future__ import annotations

import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lightning_gradtrace.store import StoreError, open_trace
from tests.synthetic import write_trace

CHUNK = "topk/shift/c.1.0"


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError("reading hangs")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_trace(tmp_path / "a.zarr", per="both", chunk_rows=5)
    return tmp_path / "a.zarr"


def _endless(place: Path) -> None:
    with place.open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk


def _directory(place: Path) -> None:
    place.mkdir()
    (place / "0").write_bytes(b"x")


STRANGERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (os.mkfifo, "it is no file"),
    "device": (lambda place: place.symlink_to("/dev/zero"), "it is no file"),
    "loop": (lambda place: place.symlink_to(place), "can't be read: (OSError|RuntimeError).*(Too many|Symlink)"),
    "endless": (_endless, "too large: expected at most"),
    "directory": (_directory, "IsADirectoryError"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_in_the_place_of_a_chunk_it_is_named_and_the_rest_stays_readable(kind, path):
    make, message = STRANGERS[kind]
    (path / CHUNK).unlink()
    make(path / CHUNK)
    with pytest.raises(StoreError, match=rf"`{CHUNK}` of .*{message}"):
        open_trace(path).topk.frame()
    (problem,) = open_trace(path).verify().problems
    assert CHUNK in problem
    assert len(open_trace(path).using("topk_step").topk.frame()) == 90


@pytest.mark.parametrize("kind", STRANGERS)
def test_in_the_place_of_the_root_document_it_is_said(kind, path):
    make, message = STRANGERS[kind]
    (path / "zarr.json").unlink()
    make(path / "zarr.json")
    with pytest.raises(StoreError, match=rf"`zarr\.json` of .*{message}"):
        open_trace(path)
    with pytest.raises(StoreError, match=rf"`zarr\.json` of .*{message}"):
        write_trace(path, writer={"overwrite": True})
    assert (path / CHUNK).is_file()


@pytest.mark.parametrize("part", ["topk", "topk/shift"])
def test_a_link_in_the_place_of_a_directory_is_read_and_never_removed(part, path, tmp_path):
    (path / part).rename(tmp_path / "elsewhere")
    (path / part).symlink_to(tmp_path / "elsewhere")
    before = sorted(file.name for file in (tmp_path / "elsewhere").rglob("*"))
    assert open_trace(path).verify().ok
    if part == "topk":
        write_trace(path, n_steps=1, writer={"overwrite": True, "commit_bytes": 10**9})
        assert set(before) <= {file.name for file in (tmp_path / "elsewhere").rglob("*")}


@pytest.mark.parametrize("key", ["zarr.json", CHUNK])
def test_a_zip_file_that_unpacks_to_more_than_was_promised_is_refused(key, path, monkeypatch):
    monkeypatch.setattr("lightning_gradtrace.store.target.read_key.__defaults__", (10**7,))
    open_trace(path).to_zip(path.with_suffix(".zip"))
    with (
        zipfile.ZipFile(path.with_suffix(".zip")) as old,
        zipfile.ZipFile(path.with_name("b.zip"), "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, bytes(5 * 10**7) if name == key else old.read(name))
    assert path.with_name("b.zip").stat().st_size < 10**6
    with pytest.raises(StoreError, match=rf"`{key}` of .* is too large: expected at most"):
        trace = open_trace(path.with_name("b.zip"))
        trace.topk.frame()


@pytest.mark.parametrize("place", ["zarr.json", CHUNK])
def test_a_disk_that_can_not_be_read_is_an_error_with_its_reason(place, path, monkeypatch):
    read = Path.read_bytes

    def failing(self: Path) -> bytes:
        if str(self).endswith(place):
            raise OSError(5, "Input/output error")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(StoreError, match=rf"`{place}` of .* can't be read: OSError: .*Input/output error"):
        open_trace(path).topk.frame()
    if place == CHUNK:
        (problem,) = open_trace(path).verify().problems
        assert "Input/output error" in problem
