"""The tables of docs/store-format.md, made from the schema: `python -m tests.docs.format_tables` writes them anew."""

from __future__ import annotations

import torch

from lightning_gradtrace.capture.shares import DenseShare, OuterShare, RowShare, SumShare
from lightning_gradtrace.record import (
    Dense,
    Division,
    Factored,
    Norms,
    ParameterInfo,
    ParameterShifts,
    Sketch,
    StepShifts,
    TokenGrads,
    TopK,
)
from lightning_gradtrace.store.codecs import codec_documents
from lightning_gradtrace.store.schema import CORE_SPECS, ArraySpec, weight_spec
from tests.docs.pages import ROOT, between

PAGE = "docs/store-format.md"


def all_specs() -> list[ArraySpec]:
    """Return the fixed arrays, those of both TopK records, and one weight snapshot of a matrix."""
    infos = [ParameterInfo("<param>", (100, 100), 0)]
    kept = (TopK(9), TopK(9, per="step"), TokenGrads(k=9), Dense(), Sketch(9), Norms())
    kept += (Division(bases={"<param>": torch.eye(100)}),)
    records = [spec for record in kept for spec in record.specs(infos)]
    return [*CORE_SPECS, *records, *factored_specs(), weight_spec("<param>", (3, 2), "float32")]


def factored_specs() -> list[ArraySpec]:
    """Return the arrays that a Factored record declares for a parameter with every kind of part."""
    outer = OuterShare(torch.zeros(2, 3, 100), torch.zeros(2, 3, 100))
    rows = RowShare(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 100), 100)
    shares = [SumShare([outer, rows]), DenseShare(torch.zeros(2, 100, 100))]
    record, info = Factored("factors"), ParameterInfo("<param>", (100, 100), 0)
    step = StepShifts([2, 2], [ParameterShifts(info, torch.ones(100, 100), shares)])  # type: ignore[list-item]
    return [*record.specs([info]), *record.later_specs(step)]


def array_table() -> str:
    """Return the table of arrays, in the order of the schema."""
    rows = ["| array | axes | type | codec | meaning |", "|---|---|---|---|---|"]
    for spec in all_specs():
        axes = ", ".join(dim.removeprefix("<param>.") for dim in spec.dims)
        axes = {
            "snapshot, 0, 1": "snapshot, ...",
            "occurrence, 0, 1": "occurrence, ...",
            "step, 0, 1": "step, ...",
        }.get(axes, axes)
        dtype = "as the parameter" if "<param>" in spec.path and spec.dtype == "float32" else spec.dtype
        rows.append(f"| `{spec.path}` | ({axes}) | {dtype} | {spec.codec} | {spec.long_name} |")
    return "\n".join(rows) + "\n"


def codec_table() -> str:
    """Return the codecs of every kind of array, in the order of encoding."""
    kinds = {
        "index": ("index", "uint32"),
        "float": ("float", "float32"),
        "fast": ("fast", "float32"),
        "small": ("small", "float32"),
        "none": ("none", "float32"),
        "plain": ("plain", "int64"),
        "plain, strings": ("plain", "str"),
    }
    rows = ["| codec in the table above | Zarr codecs, first to last |", "|---|---|"]
    for name, (codec, dtype) in kinds.items():
        spec = ArraySpec("group/name", ("step",), (), dtype, "", codec=codec)  # type: ignore[arg-type]
        found = []
        for document in codec_documents(spec):
            settings = document.get("configuration", {})
            shown = ", ".join(f"{k}={v}" for k, v in settings.items() if k != "typesize")
            found.append(f"`{document['name']}`" + (f" ({shown})" if shown else ""))
        rows.append(f"| {name} | {', '.join(found)} |")
    return "\n".join(rows) + "\n"


TABLES = {"arrays": array_table, "codecs": codec_table}


def main() -> None:
    """Put the tables into the page."""
    file = ROOT / PAGE
    for mark, make in TABLES.items():
        begin = f"<!-- {mark}: begin -->\n"
        source = file.read_text(encoding="utf-8")
        file.write_text(source.replace(begin + between(PAGE, mark), begin + make()), encoding="utf-8")


if __name__ == "__main__":
    main()
