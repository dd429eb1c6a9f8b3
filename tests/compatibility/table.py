"""The table of docs/compatibility.md: `python -m tests.compatibility.table` runs every cell and writes it anew."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

from tests.compatibility.cells import SETUPS, Outcome, Setup, run
from tests.compatibility.models import ENTRIES, Entry
from tests.docs.pages import ROOT, between, table_rows

PAGE = "docs/compatibility.md"
MARK = "compatibility"
ERROR = "clear error: "


def all_entries() -> list[Entry]:
    """Return the rows of the table."""
    from tests.compatibility.transformers_models import TRANSFORMERS

    return [*ENTRIES, *TRANSFORMERS]


def cost(outcome: Outcome) -> str:
    """Say by which way the shares of a model come, from the outcome of its first setup."""
    names = sorted(outcome.general)
    if not names:
        return "closed forms"
    return "closed forms; general rule for " + ", ".join(f"`{name}`" for name in names)


def table(outcomes: dict[tuple[str, str], Outcome], names: list[str]) -> str:
    """Return the table and the errors that it refers to."""
    errors: list[str] = []
    rows = ["| model | " + " | ".join(s.name for s in SETUPS) + " | how |", "|---" * (len(SETUPS) + 2) + "|"]
    for name in names:
        cells = []
        for setup in SETUPS:
            result = outcomes[name, setup.name].result
            if result.startswith(ERROR):
                text = result.removeprefix(ERROR)
                errors += [] if text in errors else [text]
                result = f"error {errors.index(text) + 1}"
            cells.append(result)
        rows.append(f"| {name} | " + " | ".join(cells) + f" | {cost(outcomes[name, SETUPS[0].name])} |")
    notes = [f"{number}. {text}" for number, text in enumerate(errors, 1)]
    return "\n".join([*rows, *([""] if notes else []), *notes]) + "\n"


@dataclass(frozen=True)
class Page:
    """What the committed page says."""

    rows: dict[str, list[str]]
    columns: list[str]
    errors: list[str]

    @classmethod
    def read(cls) -> Page:
        """Read the page."""
        text = between(PAGE, MARK)
        head, *rows = table_rows(text)
        notes = [line.partition(". ")[2] for line in text.splitlines() if line and line[0].isdigit()]
        return cls({row[0]: row[1:] for row in rows}, head[1:], notes)

    def result(self, entry: Entry, setup: Setup) -> str:
        """Return what it says of a cell."""
        cell = self.rows[entry.name][self.columns.index(setup.name)]
        if not cell.startswith("error "):
            return cell
        return ERROR + self.errors[int(cell.removeprefix("error ")) - 1]


def main() -> None:
    """Run all cells and put the table into the page."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    entries = all_entries()
    outcomes = {}
    for entry in entries:
        for setup in SETUPS:
            outcomes[entry.name, setup.name] = outcome = run(entry, setup)
            print(f"{entry.name}, {setup.name}: {outcome.result}", flush=True)
    file = ROOT / PAGE
    begin = f"<!-- {MARK}: begin -->\n"
    source = file.read_text(encoding="utf-8")
    written = table(outcomes, [entry.name for entry in entries])
    file.write_text(source.replace(begin + between(PAGE, MARK), begin + written), encoding="utf-8")


if __name__ == "__main__":
    main()
