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


@hydra.main(version_base="1.3", config_path=CONF, config_name="survey")
def main(cfg: DictConfig) -> None:
    """Compose the settings and ask."""
    started, output = time.monotonic(), Path(cfg.output)
    # One core for each process; the libraries read this when they are first imported there.
    os.environ["OMP_NUM_THREADS"] = "1"
    deadline = None if cfg.seconds is None else started + cfg.seconds
    jobs = jobs_of(cfg)
    done = run_jobs(
        jobs, output / "jobs", workers=cfg.workers, deadline=deadline, preload=["examples.survey.questions"]
    )
    done.to_csv(output / "jobs.csv", index=False)
    join_parts(output / "tables")
    text = summarize(output / "tables", done, Path(cfg.run))
    (output / "summary.md").write_text(text, encoding="utf-8")
    print(done.to_string(index=False))
    print(f"\n{time.monotonic() - started:.0f} s; tables and summary.md in {output}")


if __name__ == "__main__":
    main()
