"""The tables of docs/store-format.md, made from the schema: `python -m tests.docs.format_tables` writes them anew."""

from __future__ import annotations

from lightning_gradtrace.record import ParameterInfo, TokenGrads, TopK
from lightning_gradtrace.store.codecs import codec_documents
from lightning_gradtrace.store.schema import CORE_SPECS, ArraySpec, weight_spec
from tests.docs.pages import ROOT, between

PAGE = "docs/store-format.md"


def all_specs() -> list[ArraySpec]:
    """Return the fixed arrays, those of the TopK and TokenGrads records, and one weight snapshot of a matrix."""
    infos = [ParameterInfo("weight", (100, 100), 0)]
    records = [spec for record in (TopK(9), TopK(9, per="step"), TokenGrads(k=9)) for spec in record.specs(infos)]
    return [*CORE_SPECS, *records, weight_spec("<param>", (3, 2), "float32")]


def array_table() -> str:
    """Return the table of arrays, in the order of the schema."""
    rows = ["| array | axes | type | codec | meaning |", "|---|---|---|---|---|"]
    for spec in all_specs():
        axes = ", ".join(spec.dims) if spec.group != "weights/values" else "snapshot, ..."
        dtype = spec.dtype if spec.group != "weights/values" else "as the parameter"
        rows.append(f"| `{spec.path}` | ({axes}) | {dtype} | {spec.codec} | {spec.long_name} |")
    return "\n".join(rows) + "\n"


def codec_table() -> str:
    """Return the codecs of every kind of array, in the order of encoding."""
    kinds = {
        "index": ("index", "uint32"),
        "float": ("float", "float32"),
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
