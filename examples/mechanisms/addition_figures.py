"""The figures of the grokking experiment, from its tables alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREYS = ("0.88", "0.94", "0.88", "0.94")


def draw_formation(folder: Path, measures: pd.DataFrame, inner: pd.DataFrame, phases: pd.DataFrame) -> None:
    """Draw accuracies, losses, and what the squared norm is made of, by step, into ``formation.png``.

    Args:
        folder: of the run.
        measures: of the run.
        inner: from `progress`.
        phases: from `find_phases`, shaded.
    """
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name in ("train_accuracy", "test_accuracy"):
        left.plot(measures.index, measures[name], label=name.replace("_", " "))
    left.set(ylim=(0, 1.02))
    for name in ("train_loss", "test_loss"):
        middle.plot(measures.index, measures[name].clip(lower=1e-7), label=name.replace("_", " "))
    for name in ("restricted_loss", "excluded_loss"):
        middle.plot(inner.index, inner[name].clip(lower=1e-7), label=name.replace("_", " "), ls="--")
    middle.set(yscale="log")
    for name in ("embedding, key", "embedding, other", "head, key", "head, other"):
        right.plot(inner.index, inner[name], label=name, ls="-" if name.endswith("key") else "--")
    right.set(ylabel="squared norm")
    for axes in (left, middle, right):
        _shade(axes, phases)
        axes.set(xlabel="step")
        axes.legend(frameon=False, fontsize=8)
    _name(left, phases)
    figure.savefig(folder / "formation.png", dpi=120)


def draw_parts(folder: Path, parts: pd.DataFrame, phases: pd.DataFrame, smooth: int = 9) -> None:
    """Draw what the data adds over what decay takes, by step, into ``parts.png``.

    Args:
        folder: of the run.
        parts: from `parts_by_step`.
        phases: from `find_phases`, shaded.
        smooth: recorded steps of a running median.
    """
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = {
        "all weights": ["all weights"],
        "embedding": ["embedding, key", "embedding, other"],
        "head": ["head, key", "head, other"],
    }
    growth = parts.pivot_table(index=["of", "step"], columns="part", values="growth", observed=True)
    ratio = (growth["shifts"] + growth["carry"]) / -growth["decay"]
    for axes, (title, names) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        for name in names:
            if name in growth.index.get_level_values("of"):
                series = ratio.loc[name].rolling(smooth, center=True, min_periods=1).median()
                axes.plot(series.index, series, label=name)
        axes.axhline(1, color="0.4", lw=0.8)
        axes.set(title=title, xlabel="step", ylim=(0, 2))
        axes.legend(frameon=False, fontsize=8)
        _shade(axes, phases)
    figure.axes[0].set(ylabel="growth by the data / loss by decay")
    _name(figure.axes[0], phases)
    figure.savefig(folder / "parts.png", dpi=120)


def draw_samples(folder: Path, growth: pd.DataFrame, mirrored: pd.DataFrame, groups: pd.DataFrame) -> None:
    """Draw which samples make the key frequencies of the embedding grow, into ``samples.png``.

    Args:
        folder: of the run.
        growth: from `growth_by_sample`.
        mirrored: from `mirrored`.
        groups: from `by_group`.
    """
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    growth, mirrored, groups = (
        t[(t["table"] == "embedding") & (t["kind"] == "key")] for t in (growth, mirrored, groups)
    )
    for number, (phase, part) in enumerate(growth.groupby("phase", observed=True)):
        color = f"C{number}"
        values = np.sort(part["growth"].to_numpy())
        left.plot(np.linspace(0, 1, len(values)), values / np.abs(values).mean(), color=color, label=phase)
        row = mirrored[mirrored["phase"] == phase].iloc[0]
        middle.fill_between([number - 0.3, number + 0.3], row["null_low"], row["null_high"], color="0.85", lw=0)
        middle.plot([number, number], [row["low"], row["high"]], color=color)
        middle.plot(number, row["enrichment"], "o", color=color)
        rows = groups[groups["phase"] == phase]
        place = np.arange(len(rows)) + number * 0.2 - 0.3
        right.bar(place, rows["explained"], 0.18, color=color)
        right.vlines(place, rows["null_low"], rows["null_high"], color="0.2", lw=1.5)
        right.set_xticks(range(len(rows)), rows["grouping"].str.replace("_", " "), fontsize=8, rotation=30)
    left.set(xlabel="samples, sorted", ylabel="growth / mean absolute growth", ylim=(-4, 6))
    left.axhline(0, color="0.4", lw=0.8)
    left.legend(frameon=False, fontsize=8)
    middle.set(ylabel="enrichment of mirrored pairs", ylim=(0, 2), xticks=[])
    middle.axhline(1, color="0.4", lw=0.8)
    middle.set_title("grey: 95 % of permutations", fontsize=8)
    right.set(ylabel="variance explained by a grouping")
    right.set_title("black: 95 % of permutations", fontsize=8)
    figure.savefig(folder / "samples.png", dpi=120)


def draw_coherence(folder: Path, table: pd.DataFrame, null: pd.DataFrame, phases: pd.DataFrame) -> None:
    """Draw the coherence of the shifts by step, and where random signs put it, into ``coherence.png``.

    Args:
        folder: of the run.
        table: from `coherence_by_step`.
        null: from `coherence_null`.
        phases: from `find_phases`, shaded.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in (
        "network.embedding.weight",
        "network.attention.0.W_O",
        "network.mlp.0.0.weight",
        "network.head.weight",
    ):
        part = table[table["param"] == name]
        axes.plot(part["step"], part["coherence"], label=name.removeprefix("network."))
    part = table[table["param"] == "all"]
    axes.plot(part["step"], part["coherence"], color="black", lw=2, label="all weights")
    axes.vlines(null["step"], null["null_low"], null["null_high"], color="0.4", lw=3, label="random signs, 95 %")
    axes.axhline(1, color="0.4", lw=0.8)
    axes.set(xlabel="step", ylabel=r"$|\sum s_i|^2 / \sum |s_i|^2$", yscale="log")
    axes.legend(frameon=False, fontsize=8)
    _shade(axes, phases)
    _name(axes, phases)
    figure.savefig(folder / "coherence.png", dpi=120)


def _shade(axes: Axes, phases: pd.DataFrame) -> None:
    for grey, start, stop in zip(GREYS, phases["start"], phases["stop"], strict=True):
        axes.axvspan(start, stop, color=grey, zorder=0, lw=0)


def _name(axes: Axes, phases: pd.DataFrame) -> None:
    """Write the phases into the figure, from bottom to top, where they are wide enough."""
    width = phases["stop"].iloc[-1] - phases["start"].iloc[0]
    for name, start, stop in zip(phases["phase"], phases["start"], phases["stop"], strict=True):
        if stop - start > 0.04 * width:
            axes.text(
                (start + stop) / 2, 0.04, name, rotation=90, fontsize=8, color="0.4", ha="center", va="bottom",
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
