"""Ask everything that the package can answer about one run: `python -m examples.survey run=runs/wikitext2`.

Each question is asked in a process of its own, on the device that there is. Tables (CSV) are written as they come into
`<run>/survey/tables`; `summary.md` shows the short ones, and `jobs.csv` says what ran, for how long, and what failed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import hydra
import pandas as pd
from omegaconf import DictConfig

from examples.survey.jobs import run_jobs
from examples.survey.questions import jobs_of
from examples.survey.summary import summarize
from examples.survey.survey import write_table
from examples.train import CONF


def join_parts(folder: Path) -> None:
    """Join the tables of which each process wrote a part."""
    files = sorted((folder / "parts").glob("*.csv"))
    for name in dict.fromkeys(file.name.split(".")[0] for file in files):
        parts = [pd.read_csv(f, keep_default_na=False, na_values=[""]) for f in files if f.name.startswith(f"{name}.")]
        write_table(folder, name, pd.concat(parts, ignore_index=True))


def survey(cfg: DictConfig) -> pd.DataFrame:
    """Ask the questions that the settings name.

    Args:
        cfg: as composed from `conf/survey.yaml`.

    Returns:
        What became of each job, see `run_jobs`.
    """
    output = Path(cfg.output)
    # One core for each process; the libraries read this when they are first imported there.
    os.environ["OMP_NUM_THREADS"] = "1"
    deadline = None if cfg.seconds is None else time.monotonic() + cfg.seconds
    preload = ["examples.survey.questions"]
    jobs = run_jobs(jobs_of(cfg), output / "jobs", workers=cfg.workers, deadline=deadline, preload=preload)
    jobs.to_csv(output / "jobs.csv", index=False)
    join_parts(output / "tables")
    (output / "summary.md").write_text(summarize(output / "tables", jobs, Path(cfg.run)), encoding="utf-8")
    return jobs


@hydra.main(version_base="1.3", config_path=CONF, config_name="survey")
def main(cfg: DictConfig) -> None:
    """Compose the settings and ask."""
    started = time.monotonic()
    print(survey(cfg).to_string(index=False))
    print(f"\n{time.monotonic() - started:.0f} s; tables and summary.md in {cfg.output}")


if __name__ == "__main__":
    main()
