"""Models of Hugging Face transformers: every cell of docs/compatibility.md is what a training shows."""

from __future__ import annotations

import pytest

from tests.compatibility.cells import SETUPS, Setup, run
from tests.compatibility.models import Entry
from tests.compatibility.table import Page, cost
from tests.compatibility.transformers_models import TRANSFORMERS

WRITE = "`python -m tests.compatibility.table` writes the page anew"


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
@pytest.mark.parametrize("entry", TRANSFORMERS, ids=lambda entry: entry.name)
def test_every_share_of_every_parameter_is_the_oracles_or_the_page_names_the_error(entry: Entry, setup: Setup) -> None:
    outcome, page = run(entry, setup), Page.read()
    assert page.result(entry, setup) == outcome.result, WRITE
    if setup is SETUPS[0]:
        assert page.rows[entry.name][-1] == cost(outcome), WRITE
