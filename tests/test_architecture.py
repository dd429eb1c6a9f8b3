"""The sentences of the architecture, read off the imports, and the length of files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_gradtrace

PACKAGE = Path(lightning_gradtrace.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}
ZARR = {"zarr", "numcodecs"}
MOST_LINES = 350


def place(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def imports(tree: ast.AST, *, at_import: bool = False) -> Iterator[str]:
    """Yield the full names that a module imports; with `at_import` only those that run when it is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this package"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        elif at_import and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from (name for part in node.orelse for name in imports(part, at_import=True))
        else:
            yield from imports(node, at_import=at_import)


def imported(file: Path, **options: bool) -> set[str]:
    return set(imports(ast.parse(file.read_text(encoding="utf-8")), **options))


def tops(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_the_walk_sees_imports_wherever_they_stand() -> None:
    tree = ast.parse(
        "import a.b\nfrom c import d\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import e\n"
        "class K:\n    import f\ndef g():\n    from h import i\ntry:\n    import j\nexcept ImportError:\n    pass\n"
    )
    names = {"a.b", "c.d", "typing.TYPE_CHECKING", "f", "j"}
    assert set(imports(tree)) == names | {"e", "h.i"}
    assert set(imports(tree, at_import=True)) == names


def test_only_the_callback_imports_lightning() -> None:
    assert [place(f) for f in FILES if tops(imported(f)) & LIGHTNING] == ["callback.py"]


def test_only_the_store_imports_zarr() -> None:
    users = [place(f) for f in FILES if tops(imported(f)) & ZARR]
    assert users
    assert [file for file in users if not file.startswith("store/")] == []


@pytest.mark.parametrize("file", [f for f in FILES if place(f).startswith("analysis/")], ids=place)
def test_an_analysis_imports_torch_only_inside_functions_and_of_the_package_only_itself(file: Path) -> None:
    assert "torch" not in tops(imported(file, at_import=True))
    of_package = {name for name in imported(file, at_import=True) if name.startswith("lightning_gradtrace")}
    assert [name for name in of_package if not name.startswith("lightning_gradtrace.analysis")] == []


@pytest.mark.parametrize("file", [f for f in FILES if place(f).startswith("report/")], ids=place)
def test_the_report_works_from_tables_alone(file: Path) -> None:
    of_package = {name for name in imported(file) if name.startswith("lightning_gradtrace")}
    assert [name for name in of_package if not name.startswith("lightning_gradtrace.report")] == []
    assert not tops(imported(file)) & {"torch", *LIGHTNING, *ZARR}


@pytest.mark.parametrize("file", [f for f in FILES if place(f).startswith("record/search/")], ids=place)
def test_the_search_knows_no_record(file: Path) -> None:
    of_records = {name for name in imported(file) if name.startswith("lightning_gradtrace.record")}
    own = ("lightning_gradtrace.record.search.", "lightning_gradtrace.record._base.")
    assert [name for name in of_records if not name.startswith(own)] == []


def test_importing_the_analyses_does_not_import_lightning() -> None:
    code = f"import sys, lightning_gradtrace.analysis; print(*sorted({LIGHTNING} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("file", FILES, ids=place)
def test_a_file_can_be_read_in_one_sitting(file: Path) -> None:
    lines = len(file.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{place(file)} has {lines} lines, at most {MOST_LINES} are allowed: split it"
