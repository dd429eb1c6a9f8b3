"""Train the reference model and its control, and check what changes over the training: `python -m examples.phases`.

The run directory holds what `examples/train.py` writes, the series by step (`series.csv` and one table for each kind),
change points and phases, the claims (`claims.csv`) and a figure; each control has a folder of its own in it.
"""

from __future__ import annotations

from pathlib import Path

import hydra
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from examples.mechanisms.study import Claim, claim_table
from examples.phases.study import study
from examples.train import CONF, quietly, train


def run(cfg: DictConfig) -> list[Claim]:
    """Train the experiment and its controls, and write down its claims.

    Args:
        cfg: as composed from `conf/phases.yaml`.
    """
    folder = Path(cfg.run_dir)
    train(cfg)
    for name, changes in cfg.controls.items():
        control = OmegaConf.merge(cfg, changes, {"run_dir": str(folder / str(name))})
        assert isinstance(control, DictConfig)
        (folder / str(name)).mkdir()
        train(control)
    claims = study(folder)
    table: pd.DataFrame = claim_table(claims)
    table.to_csv(folder / "claims.csv", index=False)
    print(*claims, sep="\n")
    print(f"run directory  {folder}")
    return claims


@hydra.main(version_base="1.3", config_path=CONF, config_name="phases")
def main(cfg: DictConfig) -> None:
    """Compose the configuration and run."""
    quietly()
    run(cfg)


if __name__ == "__main__":
    main()
