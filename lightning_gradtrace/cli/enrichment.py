"""`gradtrace enrichment`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lightning_gradtrace.cli._options import HeadCount, Json, MinCount, Output, Rows, Seed, StepRange, TracePath
from lightning_gradtrace.cli._output import check_output, emit
from lightning_gradtrace.cli._trace import open_for, parse_heads, parse_steps, working

if TYPE_CHECKING:
    import pandas as pd

    from lightning_gradtrace.store import Trace


def enrichment(
    trace: TracePath,
    pattern: Annotated[
        str | None,
        typer.Option("--pattern", metavar="FILE.csv:COLUMN", help="Which samples have a pattern, by `sample_id`."),
    ] = None,
    token: Annotated[
        list[str] | None, typer.Option("--token", metavar="WORD", help="Texts with this word; may be repeated.")
    ] = None,
    loss_token: Annotated[
        list[str] | None,
        typer.Option("--loss-token", metavar="WORD", help="Loss of this word (TokenGrads); may be repeated."),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option("--groups", metavar="FILE.csv", help="Variance between groups: a column each, by `sample_id`."),
    ] = None,
    along: Annotated[
        bool, typer.Option("--along", help="Count what pushed along the change of the weights, not the size.")
    ] = False,
    whole: Annotated[bool, typer.Option("--whole", help="Whole heads instead of their parts.")] = False,
    min_count: MinCount = 20,
    heads: HeadCount = None,
    steps: StepRange = None,
    seed: Seed = 0,
    as_json: Json = False,
    output: Output = None,
    rows: Rows = 20,
) -> None:
    """Compare what samples with a pattern (or a word, or the loss of a word) moved in each head with their number.

    \b
    Examples:
      gradtrace enrichment runs/a.zarr --heads 4 --pattern samples.csv:repeated --steps 1000:1200 --along
      gradtrace enrichment runs/a.zarr --heads 4 --token war --token peace
      gradtrace enrichment runs/a.zarr --heads 4 --loss-token ")" --whole
      gradtrace enrichment runs/a.zarr --heads 4 --groups samples.csv

    `enrichment` is 1 by chance; `low` to `high` is its 95 % interval over samples, `null_low` to `null_high` where 95 %
    of permutations lie. Without --pattern, --token or --loss-token: all words that occur often enough. With --groups:
    `explained` is the share of the variance of what samples moved that lies between groups.

    Next: `gradtrace movers --by head` for the samples themselves.
    """
    from lightning_gradtrace import analysis

    check_output(output)
    if sum(map(bool, (pattern, token, loss_token, groups))) > 1:
        raise typer.BadParameter("give one of --pattern, --token, --loss-token and --groups")
    number, chosen = parse_heads(heads), parse_steps(steps)
    chosen = slice(chosen, chosen) if isinstance(chosen, int) else chosen
    marks = None if pattern is None else _read_pattern(pattern)
    known = None if groups is None else _read_samples(groups, "--groups")
    by, amount = ["module", "head"] if whole else ["module", "head", "part"], "toward" if along else "size"
    with working("enrichment", open_for(trace)) as opened:
        change = analysis.weight_change(opened, chosen) if along else None
        record = "token_grads" if loss_token else "topk"
        blocks = analysis.attention_heads(opened, number)
        moved = analysis.head_shifts(opened, blocks, chosen, along=change, record=record)
        if loss_token:
            kept = opened.token_grads.tokens(chosen)
            ids = _ids(opened, loss_token, "--loss-token")
            table = analysis.loss_token_enrichment(
                moved, kept, kept["token"].isin(ids), amount=amount, by=by, seed=seed
            )
        else:
            seen = opened.occurrences[opened.occurrences["step"].isin(opened.steps.loc[chosen or slice(None)].index)]
            if known is not None:
                table = analysis.grouped_variance(moved, known, amount=amount, by=by, occurrences=seen, seed=seed)
            elif marks is not None:
                table = analysis.pattern_enrichment(moved, marks, amount=amount, by=by, occurrences=seen, seed=seed)
            else:
                words = None if not token else _ids(opened, token, "--token")
                table = analysis.token_enrichment(
                    moved, opened, words, amount=amount, by=by, occurrences=seen, min_count=min_count, seed=seed
                )
    emit("enrichment", table, as_json, output, rows)


def _ids(trace: Trace, words: list[str], option: str) -> list[int]:
    """Return the numbers of words, which may be given as numbers where there is no vocabulary."""
    vocab = trace.vocab
    known = {word: number for number, word in enumerate(vocab)} if vocab is not None else {}
    unknown = [word for word in words if word not in known and not (vocab is None and word.isdigit())]
    if unknown:
        expected = (
            "token ids: the trace holds no vocabulary" if vocab is None else "words as the vocabulary writes them"
        )
        raise typer.BadParameter(f"{unknown} are not known; give {expected}", param_hint=option)
    return [known[word] if vocab is not None else int(word) for word in words]


def _read_pattern(text: str) -> pd.Series:
    """Read a column of a table with a column `sample_id`."""
    file, _, column = text.rpartition(":")
    if not file:
        raise typer.BadParameter(f"`{text}` names no column; write FILE.csv:COLUMN", param_hint="--pattern")
    table = _read_samples(file, "--pattern")
    if column not in table.columns:
        raise typer.BadParameter(
            f"`{file}` has the columns {['sample_id', *table.columns]}, expected `sample_id` and `{column}`",
            param_hint="--pattern",
        )
    return table[column]


def _read_samples(file: str, option: str) -> pd.DataFrame:
    """Read a table with a column `sample_id`, which becomes its index."""
    import pandas as pd

    try:
        table = pd.read_csv(file)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"`{file}` can't be read: {error}", param_hint=option) from None
    if "sample_id" not in table.columns:
        raise typer.BadParameter(
            f"`{file}` has the columns {list(table.columns)}, expected `sample_id` among them", param_hint=option
        )
    return table.drop_duplicates("sample_id").set_index("sample_id")
