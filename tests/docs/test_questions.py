"""Every analysis has a figure, a command, a page and a test: the tables of docs/questions.md are whole and true."""

from __future__ import annotations

import inspect
import re
import shlex

import pytest
from typer.main import get_command

from lightning_gradtrace import analysis, record, report
from lightning_gradtrace.cli import app
from lightning_gradtrace.record import Record
from tests.docs.pages import ROOT

# What follows a sample through the optimizer's memory is asked of single occurrences, from Python.
WITHOUT_FIGURE = {"eventual_shift"}


def rows() -> list[tuple[list[str], list[str], list[str], list[str]]]:
    """Return functions, figures, commands and tests of every row."""
    text = (ROOT / "docs/questions.md").read_text(encoding="utf-8")
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ") and "`" in line]
    found = []
    for _, *cells in lines:
        functions, shown, tests = (re.findall("`([^`]+)`", cell) for cell in cells)
        figures = [name for name in shown if name.startswith("plot_")]
        commands = [line for line in shown if line.startswith("gradtrace ")]
        assert len(figures) + len(commands) == len(shown)
        found.append((functions, figures, commands, [f"tests/analysis/{t}" if "/" not in t else t for t in tests]))
    return found


ROWS = rows()


def test_every_analysis_that_returns_a_table_is_there_once() -> None:
    public = {
        name
        for name, function in vars(analysis).items()
        if inspect.isfunction(function) and "DataFrame" in str(inspect.signature(function).return_annotation)
    }
    named = [name for functions, *_ in ROWS for name in functions]
    assert sorted(named) == sorted(public)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][0])
def test_what_a_row_names_exists(row: tuple[list[str], list[str], list[str], list[str]]) -> None:
    functions, figures, commands, tests = row
    if not set(functions) & WITHOUT_FIGURE:
        assert figures and commands
    for figure in figures:
        assert callable(getattr(report, figure))
    group = get_command(app)
    for line in commands:
        program, name, *words = shlex.split(line)
        command = group.get_command(None, name)  # type: ignore[attr-defined,arg-type]
        known = {option for parameter in command.params for option in parameter.opts}
        assert program == "gradtrace" and {word for word in words if word.startswith("-")} <= known, line
    texts = [(ROOT / file).read_text(encoding="utf-8") for file in tests]
    for function in functions:
        assert any(re.search(rf"\b{function}\(", text) for text in texts), f"no test of {tests} calls `{function}`"


def test_every_figure_is_named_and_every_module_is_in_the_reference() -> None:
    named = {figure for _, figures, *_ in ROWS for figure in figures}
    assert named == {name for name in vars(report) if name.startswith("plot_")}
    reference = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    modules = {getattr(analysis, name).__module__ for functions, *_ in ROWS for name in functions}
    assert [module for module in sorted(modules) if f"::: {module}\n" not in reference] == []


def test_every_record_is_in_the_reference_and_in_the_table_of_records() -> None:
    records = [k for k in vars(record).values() if inspect.isclass(k) and issubclass(k, Record) and k is not Record]
    assert len(records) > 7
    reference, concepts = ((ROOT / f"docs/{page}.md").read_text(encoding="utf-8") for page in ("api", "concepts"))
    for kind in records:
        assert f"::: {kind.__module__}.{kind.__name__}\n" in reference
        assert f"\n| `{kind.__name__}(" in concepts


@pytest.mark.parametrize("name", sorted({name for functions, *_ in ROWS for name in functions}))
def test_every_docstring_names_what_goes_in_what_comes_out_and_what_fails(name: str) -> None:
    function = getattr(analysis, name)
    text = inspect.getdoc(function) or ""
    raises = ["Raises:"] if "raise " in inspect.getsource(function) else []
    takes = ["Args:"] if inspect.signature(function).parameters else []
    for part in (*takes, "Returns:", *raises):
        assert part in text, f"`{name}` has no {part}"
