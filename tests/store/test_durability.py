"""The order in which files of a local trace reach the disk: contents, then names, then the commit mark."""

from __future__ import annotations

import os
from pathlib import Path

from tests.synthetic import write_trace


def test_contents_and_names_are_on_disk_before_the_commit_mark(tmp_path, monkeypatch):
    events: list[tuple[str, str]] = []
    replace = Path.replace

    def record_fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}") if os.path.exists("/proc/self/fd") else ""
        events.append(("fsync", path))

    def record_replace(self, target):
        events.append(("replace", str(target)))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    root = tmp_path / "a.zarr"
    write_trace(root, n_steps=2)

    synced = {path for kind, path in events if kind == "fsync"}
    renamed = [path for kind, path in events if kind == "replace"]
    marks = [number for number, event in enumerate(events) if event == ("replace", str(root / "zarr.json"))]
    assert len(marks) == 3, "the announcement, the params table, the end"
    assert sum(kind == "replace" for kind, _ in events) == sum("partial" in path for _, path in events if path), (
        "one each"
    )
    for before, mark in zip([0, *marks], marks, strict=False):
        written = [path for kind, path in events[before:mark] if kind == "replace" and path != str(root / "zarr.json")]
        last = max((number for number in range(before, mark) if events[number][0] == "replace"), default=before)
        directories = {path for kind, path in events[last:mark] if kind == "fsync"}
        assert {str(Path(path).parent) for path in written} <= directories
    assert renamed and synced
    made = [folder for folder in (root, *root.rglob("*")) if folder.is_dir()]
    assert {str(folder.parent) for folder in made} <= synced, "a directory's own name stands in the one above it"
