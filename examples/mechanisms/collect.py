"""Gather finished runs into one small folder: `python -m examples.mechanisms.collect RUN_DIR... --out results`.

Of every run come along its tables, figures and settings, and the measures of its controls; traces and weights stay
where they are. `claims.csv` has one row per claim and run, `claims.md` the same as a table with a column per run.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

SUFFIXES = (".csv", ".png", ".txt", ".yaml")


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Return the finished runs among folders and, for those of a multirun, right below them.

    Args:
        folders: run directories, or directories that hold some.

    Returns:
        Folders with a `claims.csv`, each once, in order.

    Raises:
        FileNotFoundError: a folder holds no finished run.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        runs = [path.parent for path in sorted([*folder.glob("claims.csv"), *folder.glob("*/claims.csv")])]
        if not runs:
            raise FileNotFoundError(
                f"`{folder}` holds no finished run: no `claims.csv` in it or in a folder right below it. Pass the run "
                "directory that `python -m examples.mechanisms` printed, or that of a multirun"
            )
        found |= dict.fromkeys(runs)
    return list(found)


def collect(runs: Sequence[Path], out: Path, max_bytes: int = 2_000_000) -> tuple[pd.DataFrame, list[Path]]:
    """Copy what is small of some runs, and put their claims together.

    Args:
        runs: run directories.
        out: where to; run by run into ``<experiment>/seed_<seed>``.
        max_bytes: largest file that is copied.

    Returns:
        The claims: experiment, seed, claim (number in its experiment), text, found, relation, wanted, holds; and the
        files that were left out because of their size.

    Raises:
        ValueError: two runs have the same experiment and seed.
    """
    tables, left_out, targets = [], [], dict[Path, Path]()
    for run in runs:
        cfg = OmegaConf.load(run / "config.yaml")
        target = out / str(cfg.name) / f"seed_{cfg.seed}"
        if target in targets:
            raise ValueError(
                f"`{targets[target]}` and `{run}` are both runs of `{cfg.name}` with seed {cfg.seed}; pass one of them"
            )
        targets[target] = run
        for path in _small_files(run):
            if path.stat().st_size > max_bytes:
                left_out.append(path)
                continue
            copy = target / path.relative_to(run)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        claims = pd.read_csv(run / "claims.csv")
        tables.append(claims.assign(experiment=str(cfg.name), seed=int(cfg.seed), claim=range(1, len(claims) + 1)))
    joined = pd.concat(tables, ignore_index=True)
    order = ["experiment", "seed", "claim"]
    return joined[[*order, *(name for name in joined if name not in order)]].sort_values(order), left_out


def by_seed(claims: pd.DataFrame) -> str:
    """Return claims as Markdown: a table per experiment, a row per claim, what each seed found, failures in bold.

    Args:
        claims: from `collect`. Texts that differ between seeds are those of the first one.
    """
    lines: list[str] = []
    for experiment, part in claims.groupby("experiment"):
        seeds = sorted(part["seed"].unique())
        lines += ["", f"## {experiment}", "", "| claim | wanted | " + " | ".join(f"seed {s}" for s in seeds) + " |"]
        lines.append("|---" * (2 + len(seeds)) + "|")
        for _, rows in part.groupby("claim"):
            first = rows.iloc[0]
            found = rows.set_index("seed").apply(_cell, axis=1).reindex(seeds, fill_value="")
            wanted = f"{first['relation']} {first['wanted']:g}"
            lines.append(f"| {first['text']} | {wanted} | " + " | ".join(found) + " |")
    return "\n".join(lines[1:]) + "\n"


def _cell(row: pd.Series) -> str:
    return f"{row['found']:.4g}" if row["holds"] else f"**{row['found']:.4g}**"


def _small_files(run: Path) -> list[Path]:
    """Return tables, figures and settings of a run and of its controls; Hydra's own folder and traces left out."""
    folders = [run, *(path.parent for path in run.glob("*/measures.csv"))]
    return sorted(path for folder in folders for path in folder.iterdir() if path.suffix in SUFFIXES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect the runs that the command line names, and say how each claim fared."""
    parser = argparse.ArgumentParser(prog="python -m examples.mechanisms.collect", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or directories of multiruns")
    parser.add_argument("--out", type=Path, required=True, help="folder for what is collected")
    parser.add_argument("--max-bytes", type=int, default=2_000_000, help="largest file that is copied")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    claims, left_out = collect(find_runs(options.runs), options.out, options.max_bytes)
    claims.to_csv(options.out / "claims.csv", index=False)
    table = by_seed(claims)
    (options.out / "claims.md").write_text(table)
    print(table, *(f"left out, too large: {path}" for path in left_out), sep="\n")


if __name__ == "__main__":
    main()
