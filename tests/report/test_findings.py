"""What the page says first is what the tables hold, with chance beside it, also where there is nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lightning_gradtrace.report.findings import findings
from tests.report.conftest import Tables, make_page_tables


def said(tables: Tables) -> dict[str, str]:
    return dict(findings(tables))


def test_counts_are_those_of_the_tables_and_chance_stands_beside_them() -> None:
    tables = make_page_tables(("ship", "sail"))
    tables["neurons"]["evidence"] = [7.5, 1.9, np.nan, 2.1]
    found = said(tables)
    assert found["Words"].startswith("The samples behind 3 of the 4 neurons share notable words.")
    assert "at q < 0.01 in 2 (0.0 expected by chance" in found["Words"]
    assert found["Words"].endswith("1.linear2 column 3, ship sail")
    assert "1 of 2 neurons flip" in found["Effect"] and "by chance about 0.1 would do either" in found["Effect"]
    assert "1.linear2 (100%)" in found["Movement"]
    assert "at most 1.0e-06 of it, in 4 checked of 100 steps" in found["Record"] and " add up to " in found["Record"]


def test_what_is_missing_or_bad_is_said() -> None:
    tables = make_page_tables()
    few = {name: tables[name] for name in ("run", "steps", "neurons")}
    few["neurons"] = few["neurons"].drop(columns=["evidence"])
    few["run"] = pd.DataFrame({"name": ["trace"], "value": ["incomplete: KeyboardInterrupt"]})
    few["steps"] = few["steps"].assign(residual=0.5)
    found = said(few)
    assert list(found) == ["Words", "Effect", "Record"]
    assert "Not asked: no neuron was switched off" in found["Effect"]
    assert (
        found["Record"].startswith("The trace is incomplete: KeyboardInterrupt. ")
        and "do not add up" in found["Record"]
    )
    few["steps"] = few["steps"].assign(residual=np.nan)
    few["neurons"] = few["neurons"].assign(n_notable=0)
    found = said(few)
    assert "The ledger was never computed" in found["Record"]
    assert found["Words"] == "None of the 4 neurons has notable words under these thresholds."


def test_neurons_that_could_not_be_compared_are_no_result() -> None:
    tables = make_page_tables()
    tables["controls"] = tables["controls"].assign(low=np.nan, high=np.nan)
    assert "none could be compared with random samples" in said(tables)["Effect"]
