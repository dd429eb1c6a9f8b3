"""One figure for each table of `lightning_gradtrace.analysis`: functions of a table that return matplotlib Axes.

Every function takes `ax`, the Axes to draw in; None makes a figure of its own (`ax.figure`), outside pyplot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lightning_gradtrace.report.summary import shorten
from lightning_gradtrace.report.theme import LIGHT, need_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST = 25
_LONGEST = 28


def plot_outliers(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `outliers`: value of each outlier over the step in which it happened."""
    ax = _axes(table, {"step", "value", "rank"}, ax)
    ax.scatter(table["step"], table["value"], s=6, color=LIGHT.faint)
    first = table[table["rank"] == 1]
    ax.scatter(first["step"], first["value"], s=9, color=LIGHT.accent, label="largest of its group")
    ax.set(title="Largest shifts", xlabel="step", ylabel="value")
    if len(first):
        ax.legend(loc="upper right")
    return ax


def plot_entries(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `count_entries` or `frequent_entries`: how often each entry was selected, by rank."""
    ax = _axes(table, {"param", "count"}, ax)
    ranked = table.sort_values("count", ascending=False, kind="stable").reset_index(drop=True)
    ax.plot(ranked.index + 1, ranked["count"], color=LIGHT.accent, linewidth=1.5)
    if len(ranked):
        ax.set_xscale("log")
        ax.set_yscale("log")
    ax.set(title="How often entries were selected", xlabel="rank of the entry", ylabel="occurrences")
    return ax


def plot_tokens(table: pd.DataFrame, ax: Axes | None = None, *, n: int = _MOST) -> Axes:
    """Draw the table of `notable_tokens`: relative frequency over count; the `n` of largest score have names.

    Names that would lie on others are left out.
    """
    ax = _axes(table, {"count", "relative", "score", "text"}, ax)
    ax.scatter(table["count"], table["relative"], s=6, color=LIGHT.faint)
    if (table["count"] > 0).any():
        ax.set_xscale("log")
        ax.set_yscale("log")
    _name_points(ax, table.nlargest(n, "score").drop_duplicates("text"), "count", "relative")
    ax.set(title="Notable tokens", xlabel="count", ylabel="relative frequency")
    return ax


def plot_controls(table: pd.DataFrame, ax: Axes | None = None, *, measure: str = "flip_rate", n: int = _MOST) -> Axes:
    """Draw a table of controls, of components or pooled: effect of one measure with its interval, against zero.

    Args:
        table: of the controls, concatenated, or of `pool_controls`.
        ax: the Axes to draw in; None makes a figure.
        measure: which rows: `flip_rate`, `notable_flip_rate`, `notable_share` or `token_share`. The rows of
            `frequency_control`, whose measure is `proportion`, are always drawn.
        n: at most so many rows.

    Raises:
        ValueError: a column is missing.
    """
    ax = _axes(table, {"control", "measure", "effect", "low", "high"}, ax)
    part = table[table["measure"].isin([measure, "proportion"]) & table["effect"].notna()].head(n)
    keys = [*table.columns[: list(table.columns).index("measure")]]
    return _intervals(ax, part, keys, "effect", "More than its control?", f"{measure.replace('_', ' ')}, difference")


def plot_layers(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `layer_table`: per parameter, the share of flipped tokens that were notable beforehand."""
    ax = _axes(table, {"param", "notable_share"}, ax)
    part = table.assign(label=_labels(table, ["param"]))
    return _bars(ax, part, "label", "notable_share", "Notable tokens among the flipped", "share, mean over neurons")


def plot_effects(table: pd.DataFrame, ax: Axes | None = None, *, n: int = _MOST) -> Axes:
    """Draw the table of `ablation_effects`: change of the loss with its interval, the `n` largest ones."""
    ax = _axes(table, {"loss_change", "low", "high"}, ax)
    part = table.reindex(table["loss_change"].abs().sort_values(ascending=False).index).head(n)
    keys = list(table.columns[: list(table.columns).index("n_samples")]) if "n_samples" in table else []
    return _intervals(ax, part, keys, "loss_change", "Loss without it", "change of the loss, nats")


def plot_enrichment(table: pd.DataFrame, ax: Axes | None = None, *, n: int = _MOST) -> Axes:
    """Draw the table of `pattern_enrichment`: enrichment with its interval over that of the null, the first `n` rows.

    Intervals that are much wider than the null's run out of the frame.
    """
    ax = _axes(table, {"n_samples", "enrichment", "low", "high", "null_low", "null_high"}, ax)
    part = table.head(n).iloc[::-1]
    place = np.arange(len(part))
    ax.axvline(1, color=LIGHT.faint, linewidth=1)
    ax.hlines(place, part["null_low"], part["null_high"], color=LIGHT.faint, linewidth=7, alpha=0.5)
    ax.hlines(place, part["low"], part["high"], color=LIGHT.ink, linewidth=1.2)
    ax.plot(part["enrichment"], place, "D", color=LIGHT.accent, markersize=4)
    ax.set_yticks(place, _labels(part, list(table.columns[: list(table.columns).index("n_samples")])), parse_math=False)
    drawn = part[["enrichment", "null_low", "null_high"]].to_numpy(float)
    if np.isfinite(drawn).any():
        ax.set_xlim(np.nanmin(drawn) - 0.5, np.nanmax(drawn) + 0.5)
    ax.set(title="Enrichment (band: null)", xlabel="times the share in the data")
    return ax


def plot_token_losses(table: pd.DataFrame, ax: Axes | None = None, *, n: int = _MOST) -> Axes:
    """Draw the table of `token_losses`: the `n` tokens whose loss grows most, in the worst ablation."""
    ax = _axes(table, {"text", "loss_change", "count"}, ax)
    part = table.sort_values("loss_change", ascending=False, kind="stable").drop_duplicates("text").head(n)
    return _bars(ax, part, "text", "loss_change", "Tokens that lose most", "nats")


def plot_flips(table: pd.DataFrame, ax: Axes | None = None, *, n: int = _MOST) -> Axes:
    """Draw the table of `flip_tables` or `count_flips`: proportion of flips of the `n` tokens that flip most.

    Flips and counts of several ablations add up.
    """
    ax = _axes(table, {"text", "flips", "count", "proportion"}, ax)
    part = table.groupby("text", sort=False)[["flips", "count"]].sum().nlargest(n, "flips").reset_index()
    part["proportion"] = part["flips"] / part["count"].clip(lower=1)
    return _bars(ax, part, "text", "proportion", "Flipped predictions", "flips / count")


def plot_activations(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `activation_baseline`: where flagged neurons rank among all of their weight."""
    ax = _axes(table, {"rank_high", "n_neurons"}, ax)
    share = (table["rank_high"] - 1) / (table["n_neurons"] - 1).clip(lower=1)
    ax.hist(share, bins=np.linspace(0, 1, 21).tolist(), color=LIGHT.accent)
    ax.axhline(len(table) / 20, color=LIGHT.contrast, linestyle="--", linewidth=1)
    ax.set(title="Rank by activation on notable tokens", xlabel="0: highest of its weight, 1: lowest", ylabel="pairs")
    return ax


def plot_top_samples(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `top_samples`: how many samples of each neuron are in both of its lists."""
    ax = _axes(table, {"param", "axis", "neuron", "kind", "both"}, ax)
    part = table[table["kind"] == "shift"].groupby(["param", "axis", "neuron"], sort=False)["both"].mean().reset_index()
    part["label"] = _labels(part, ["param", "axis", "neuron"])
    title = "Samples that move a neuron and activate it"
    return _bars(ax, part.head(_MOST), "label", "both", title, "share of its list")


def plot_bigrams(table: pd.DataFrame, ax: Axes | None = None, *, n: int = _MOST) -> Axes:
    """Draw the table of `bigram_shifts`: the `n` pairs that changed most."""
    ax = _axes(table, {"text", "next_text", "shift"}, ax)
    part = table.reindex(table["shift"].abs().sort_values(ascending=False).index).head(n)
    part = part.assign(label=part["text"].astype(str) + " " + part["next_text"].astype(str))
    return _bars(ax, part, "label", "shift", "Pairs of tokens", "shift of their score")


def plot_weights(table: pd.DataFrame, ax: Axes | None = None, *, value: str = "norm") -> Axes:
    """Draw a column of `weight_statistics` over training, one line for each parameter."""
    ax = _axes(table, {"param", "step", value}, ax)
    return _lines(ax, table, ["param"], value, "Weights over training")


def plot_spectra(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `weight_spectra`: singular values by rank, one line for each snapshot, the later the darker."""
    ax = _axes(table, {"param", "step", "rank", "singular_value"}, ax)
    groups = list(table.groupby(["param", "step"], sort=False))
    for number, (key, part) in enumerate(groups):
        shade = 0.25 + 0.75 * (number + 1) / len(groups)
        label = f"step {key[1]}" if number in (0, len(groups) - 1) else None
        ax.plot(part["rank"], part["singular_value"], color=LIGHT.accent, alpha=shade, linewidth=1, label=label)
    ax.set(title="Spectra", xlabel="rank", ylabel="singular value")
    if groups:
        ax.legend(fontsize=7)
    return ax


def plot_directions(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `direction_shifts`: shift of every occurrence along each direction, over steps."""
    ax = _axes(table, {"direction", "step", "shift"}, ax)
    for number, part in table.groupby("direction"):
        ax.plot(part["step"], part["shift"], ".", markersize=3, label=f"direction {number}")
    ax.set(title="Shifts along directions", xlabel="step", ylabel="shift")
    if 0 < table["direction"].nunique() <= 8:
        ax.legend(fontsize=7)
    return ax


def plot_movement(table: pd.DataFrame, ax: Axes | None = None, *, n: int = _MOST) -> Axes:
    """Draw the table of `movement`: when the `n` groups that moved most did so, each in shares of its movement."""
    ax = _axes(table, {"step", "moved"}, ax)
    keys = [c for c in table.columns if c not in ("step", "shifts", "moved", "net")]
    wide = table.pivot_table(index=keys, columns="step", values="moved", aggfunc="sum", sort=False, observed=True)
    wide = wide.loc[wide.sum(axis=1).sort_values(ascending=False, kind="stable").index].head(n)
    share = wide.div(wide.sum(axis=1).where(lambda s: s > 0), axis=0).to_numpy()
    if share.size:
        steps = wide.columns.to_numpy(float)
        width = steps[1] - steps[0] if len(steps) > 1 else 1.0
        ax.imshow(
            share,
            aspect="auto",
            extent=(steps[0], steps[-1] + width, len(wide) - 0.5, -0.5),
            cmap="Blues",
            interpolation="nearest",
        )
    ax.set_yticks(np.arange(len(wide)), _labels(wide.index.to_frame(index=False), keys), parse_math=False)
    ax.set(title="When did it move", xlabel="step")
    return ax


def plot_formation(table: pd.DataFrame, ax: Axes | None = None, *, n: int = _MOST) -> Axes:
    """Draw the table of `formation`: the span of steps in which each of the first `n` groups moved."""
    columns = [c for c in table.columns if c.startswith("step_")]
    ax = _axes(table, {"moved", "order"}, ax)
    keys = [c for c in table.columns if c not in ("moved", "order", *columns)]
    part, place = table.head(n), np.arange(min(n, len(table)))
    ax.hlines(place, part[columns[0]], part[columns[-1]], color=LIGHT.faint, linewidth=3)
    ax.plot(part[columns[len(columns) // 2]], place, "o", color=LIGHT.accent, markersize=4)
    ax.set_yticks(place, _labels(part, keys), parse_math=False)
    ax.invert_yaxis()
    ax.set(title="In which order they formed", xlabel="step")
    return ax


def plot_movers(table: pd.DataFrame, ax: Axes | None = None, *, n: int = _MOST) -> Axes:
    """Draw the table of `movers`: how much of each group's movement its listed samples explain together."""
    ax = _axes(table, {"sample_id", "share", "rank"}, ax)
    keys = list(table.columns[: list(table.columns).index("rank")])
    part = table.groupby(keys, sort=False, observed=True)["share"].sum().nlargest(n).reset_index()
    part["label"] = _labels(part, keys)
    return _bars(ax, part, "label", "share", "Who moved it", "share of the movement by the listed samples")


def plot_changes(
    series: pd.DataFrame, changes: pd.DataFrame, ax: Axes | None = None, *, value: str, at: str = "step"
) -> Axes:
    """Draw one series and its change points.

    Args:
        series: one series of the table that `change_points` was given.
        changes: from `change_points`, of the same series.
        ax: the Axes to draw in; None makes a figure.
        value: column of the series.
        at: column that orders it.

    Raises:
        ValueError: a column is missing.
    """
    ax = _axes(series, {at, value}, ax)
    ordered = series.sort_values(at)
    ax.plot(ordered[at], ordered[value], color=LIGHT.accent, linewidth=1)
    for point in changes[at]:
        ax.axvline(point, color=LIGHT.contrast, linestyle="--", linewidth=1)
    ax.set(title="Change points", xlabel=at, ylabel=value.replace("_", " "))
    return ax


def _axes(table: pd.DataFrame, needed: set[str], ax: Axes | None) -> Axes:
    missing = needed - set(table.columns)
    if missing:
        raise ValueError(f"the table lacks the columns {sorted(missing)}, it has {list(table.columns)}")
    if ax is not None:
        return ax
    need_matplotlib()
    from matplotlib.figure import Figure

    ax = Figure(figsize=(6.4, 4.0), layout="constrained").subplots()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _bars(ax: Axes, table: pd.DataFrame, label: str, value: str, title: str, xlabel: str) -> Axes:
    place = np.arange(len(table))[::-1]
    ax.barh(place, table[value], color=LIGHT.accent, height=0.7)
    ax.set_yticks(place, [_plain(text) for text in table[label]], parse_math=False, fontsize=_size(len(table)))
    ax.set(title=title, xlabel=xlabel)
    return ax


def _intervals(ax: Axes, table: pd.DataFrame, keys: Sequence[str], value: str, title: str, xlabel: str) -> Axes:
    place = np.arange(len(table))[::-1]
    ax.axvline(0, color=LIGHT.faint, linewidth=1)
    ax.hlines(place, table["low"], table["high"], color=LIGHT.ink, linewidth=1.2)
    ax.plot(table[value], place, "D", color=LIGHT.accent, markersize=4)
    ax.set_yticks(place, _labels(table, keys), parse_math=False, fontsize=_size(len(table)))
    ax.locator_params(axis="x", nbins=6)
    ax.set(title=title, xlabel=xlabel)
    return ax


def _size(n_rows: int) -> float:
    """Return a size of letters at which so many lines of a figure don't touch."""
    return 9.0 if n_rows <= 15 else 7.0


def _name_points(ax: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """Write the text of each point beside it, the first ones first, unless another one is in its way."""
    ax.autoscale_view()
    to_axes = (ax.transData + ax.transAxes.inverted()).transform
    taken = np.empty((0, 2))
    for one in table.to_dict("records"):
        at = to_axes((one[x], one[y]))
        if (np.abs(taken - at) < (0.1, 0.04)).all(axis=1).any():
            continue
        taken = np.vstack([taken, at])
        ax.annotate(_plain(one["text"]), (one[x], one[y]), fontsize=7, color=LIGHT.accent, parse_math=False)


def _lines(ax: Axes, table: pd.DataFrame, keys: Sequence[str], value: str, title: str) -> Axes:
    groups = list(table.groupby(list(keys), sort=False))
    labels = _labels(pd.DataFrame([key for key, _ in groups], columns=list(keys)), keys)
    for label, (_, part) in zip(labels, groups, strict=True):
        ax.plot(part["step"], part[value], linewidth=1.2, label=label)
    if 0 < len(groups) <= 12:
        ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    ax.set(title=title, xlabel="step", ylabel=value.replace("_", " "))
    return ax


def _labels(table: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    names = table[list(keys)].copy()
    for column in {"param", "module"} & set(keys):
        names[column] = names[column].astype(str).map(shorten(names[column].astype(str)))
    return [_label(key) for key in names.itertuples(index=False, name=None)]


def _label(key: object) -> str:
    """Name a group: without a module that its parameter names too, and of long names the end."""
    parts = [str(part) for part in key] if isinstance(key, tuple) else [str(key)]
    kept = [part for part in parts if not any(other.startswith(f"{part}.") for other in parts)]
    return _plain(" ".join(part if len(part) <= _LONGEST else "…" + part[1 - _LONGEST :] for part in kept))


def _plain(text: object) -> str:
    """Show control characters, which a token may hold and no font has, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
