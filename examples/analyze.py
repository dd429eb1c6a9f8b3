"""Read the trace of a run back as words: `python -m examples.analyze run=runs/demo`.

The chain of the 2023 method: entries, notable tokens, neurons, ablation with four controls, layer table. Tables (CSV),
figures (PNG) and a static page go to `<run>/analysis`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import hydra
import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from examples.data.base import TextDataModule
from examples.ground_truth import planted_scores
from examples.models import LanguageModel
from examples.models.language_model import batch_first_logits
from examples.train import CONF
from lightning_gradtrace import analysis, open_trace, overview, report

WRITTEN = ("config.yaml", "metrics.yaml", "model.ckpt", "trace.zarr")


def load_run(run: Path, device: str = "cpu") -> tuple[DictConfig, LanguageModel]:
    """Return the resolved configuration of a run and its trained model.

    Args:
        run: directory that `examples/train.py` wrote.
        device: where the model goes; analyses run it where it is.

    Raises:
        FileNotFoundError: it did not, or did not finish.
    """
    missing = [name for name in WRITTEN if not (run / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"`run` is `{run}`, which lacks {missing}; expected the run directory of a finished "
            "`python -m examples.train`, which prints it at its end"
        )
    cfg = OmegaConf.load(run / "config.yaml")
    assert isinstance(cfg, DictConfig)
    checkpoint = torch.load(run / "model.ckpt", weights_only=True, map_location="cpu")
    model = instantiate(cfg.model, n_tokens=checkpoint["hyper_parameters"]["n_tokens"])
    model.load_state_dict(checkpoint["state_dict"])
    return cfg, model.eval().to(device)


def model_of_run(run: str) -> tuple[LanguageModel, Any]:
    """Return the model of a run and how to call it, as `gradtrace --model examples.analyze:model_of_run` wants it."""
    return load_run(Path(run))[1], batch_first_logits


def analyze(run: Path, output: Path, overrides: dict[str, Any] | None = None) -> dict[str, pd.DataFrame]:
    """Run the whole chain on one trace and write the report.

    Args:
        run: run directory.
        output: where tables, figures and page go.
        overrides: thresholds by name that replace those of the run's configuration; None values don't.
    """
    run_cfg, model = load_run(run)
    cfg = OmegaConf.merge(run_cfg.analysis, {k: v for k, v in (overrides or {}).items() if v is not None})
    trace = open_trace(run / "trace.zarr")
    print(f"{trace.n_occurrences:,} occurrences, {trace.n_entries:,} entries tracked")

    counts = analysis.count_entries(trace)
    entries = counts.head(cfg.n_entries)  # what `frequent_entries` returns, without another pass
    find_tokens = partial(
        analysis.notable_tokens,
        min_count=cfg.min_count,
        n_relative=cfg.n_relative,
        n_notable=cfg.n_notable,
        min_relative=cfg.min_relative,
    )
    notable = find_tokens(trace, entries)
    neurons = analysis.neurons(trace, entries, notable, cfg.axis)
    few = neurons["n_samples"] <= cfg.max_sample_share * trace.occurrences["sample_id"].nunique()
    chosen = neurons[(neurons["n_notable"] > 0) & few].head(cfg.n_neurons or len(neurons))
    print(
        f"{len(entries):,} entries kept, {len(neurons):,} neurons, {(neurons['n_notable'] > 0).sum():,} with notable "
        f"tokens, {len(chosen):,} of them switched off"
    )

    tokens = trace.tokens()[1]
    predictor = analysis.Predictor(model, tokens, batch_size=cfg.batch_size, forward=batch_first_logits)
    common = {"n_samples": cfg.n_samples, "seed": cfg.seed}
    ablation = analysis.neuron_ablation(trace, predictor, chosen, entries, **common)
    common["n_resamples"] = cfg.n_resamples
    null = {"find_tokens": find_tokens, "n_permutations": cfg.n_permutations, "within": cfg.within}
    controls = pd.concat(
        [
            analysis.random_control(trace, predictor, chosen, entries, **common),
            analysis.peer_control(trace, predictor, chosen, entries, n_peers=cfg.n_other_neurons, **common),
            analysis.frequency_control(trace, predictor, chosen, entries, **common),
            analysis.null_control(trace, predictor, chosen, entries, **null, **common),
        ],
        ignore_index=True,
    )
    tables = {
        "run": report.run_summary(trace.attrs, trace.steps, _facts(run, run_cfg)),
        "steps": _with_index(trace.steps, "step"),
        "frequencies": counts["count"].value_counts().rename_axis("count").reset_index(name="entries"),
        "entries": entries,
        "notable": notable,
        "neurons": neurons,
        "ablation": ablation,
        "controls": controls,
        "pooled": analysis.pool_controls(controls, seed=cfg.seed, n_resamples=cfg.n_resamples),
        "layers": analysis.layer_table(ablation),
        "flips": overview.flips_of(trace, predictor, chosen, entries, n_samples=cfg.n_samples, seed=cfg.seed),
    }
    files = report.write_report(output, tables, title=f"Trace of experiment {run_cfg.name}")
    _print_result(tables, run, files, run_cfg, notable)
    return tables


def _facts(run: Path, cfg: DictConfig) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in (run / "trace.zarr").rglob("*") if file.is_file())
    facts = {"experiment": cfg.name, "seed": cfg.seed, "trace, megabytes": f"{size / 1e6:.1f}"}
    metrics = OmegaConf.to_container(OmegaConf.load(run / "metrics.yaml"))
    assert isinstance(metrics, dict)
    return facts | {str(name).replace("_", " "): f"{value:.2f}" for name, value in metrics.items()}


def _with_index(table: pd.DataFrame, name: str) -> pd.DataFrame:
    return table if name in table.columns else table.rename_axis(name).reset_index()


def _print_result(
    tables: dict[str, pd.DataFrame], run: Path, files: report.ReportFiles, cfg: DictConfig, notable: pd.DataFrame
) -> None:
    print("\nFlip proportion of each neuron's notable tokens when the neuron is switched off\n")
    print(report.result_text(tables))
    data: TextDataModule = instantiate(cfg.data)
    if hasattr(data, "topics"):
        scores = planted_scores(notable, data.topics)
        print("\nGround truth: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in scores.items()))
    print(f"\ntrace    {run / 'trace.zarr'}")
    print(f"tables   {files.tables[0].parent}/*.csv")
    print(f"figures  {files.figures[0].parent}/*.png")
    print(f"page     {files.page}")


@hydra.main(version_base="1.3", config_path=CONF, config_name="analyze")
def main(cfg: DictConfig) -> None:
    """Compose the configuration and analyse."""
    analyze(Path(cfg.run), Path(cfg.output), dict(cfg.analysis))


if __name__ == "__main__":
    main()
