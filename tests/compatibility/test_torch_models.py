"""Models of torch alone: every cell of docs/compatibility.md is what a training shows."""

from __future__ import annotations

import pytest

from tests.compatibility.cells import SETUPS, Setup, run
from tests.compatibility.models import ENTRIES, Entry
from tests.compatibility.table import Page, all_entries, cost

WRITE = "`python -m tests.compatibility.table` writes the page anew"


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_every_share_of_every_parameter_is_the_oracles_or_the_page_names_the_error(entry: Entry, setup: Setup) -> None:
    outcome, page = run(entry, setup), Page.read()
    assert page.result(entry, setup) == outcome.result, WRITE
    if setup is SETUPS[0]:
        assert page.rows[entry.name][-1] == cost(outcome), WRITE


def test_the_page_has_a_row_for_every_model_and_a_column_for_every_setup() -> None:
    page = Page.read()
    assert list(page.rows) == [entry.name for entry in all_entries()], WRITE
    assert page.columns == [*(setup.name for setup in SETUPS), "how"], WRITE
