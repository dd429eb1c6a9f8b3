"""Every plot function draws what its table holds, also an empty one, and names a column that is missing."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace import Division, GradTrace, Norms, TopK, analysis, open_trace
from lightning_gradtrace.report import plots
from lightning_gradtrace.report.plots._shared import label_of
from tests.analysis.models import PlantedLM, planted_world
from tests.analysis.test_weights import snapshots, trace_with
from tests.test_callback import Model, fit

FUNCTIONS = {name: f for name, f in vars(plots).items() if name.startswith("plot_")}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    world, entries = planted_world(), np.arange(16)
    notable = analysis.notable_tokens(world.trace, entries)
    neurons = analysis.neurons(world.trace, entries, notable)
    ablated = analysis.ablate(PlantedLM(), world.trace.tokens()[1][:20], neurons)
    moved = analysis.movement(world.trace)
    weights = trace_with(snapshots())
    return {
        "plot_outliers": analysis.outliers(world.trace),
        "plot_tokens": notable.assign(text="$x^$"),
        "plot_entries": analysis.count_entries(world.trace),
        "plot_controls": analysis.random_control(world.trace, PlantedLM(), neurons, entries, n_resamples=9),
        "plot_ablation": analysis.neuron_ablation(world.trace, PlantedLM(), neurons, entries),
        "plot_neurons": neurons,
        "plot_layers": analysis.layer_table(analysis.neuron_ablation(world.trace, PlantedLM(), neurons, entries)),
        "plot_effects": analysis.ablation_effects(ablated, n_resamples=9),
        "plot_enrichment": enrichment(world.trace),
        "plot_token_losses": analysis.token_losses(ablated),
        "plot_flips": analysis.flip_tables(ablated),
        "plot_activations": analysis.activation_baseline(world.trace, PlantedLM(), neurons),
        "plot_top_samples": analysis.top_samples(world.trace, PlantedLM(), neurons),
        "plot_bigrams": analysis.bigram_shifts(weights, "E", "U"),
        "plot_weights": analysis.weight_statistics(weights),
        "plot_spectra": analysis.weight_spectra(weights),
        "plot_directions": analysis.direction_shifts(world.trace, "hidden.weight", np.eye(4)),
        "plot_movement": moved,
        "plot_formation": analysis.formation(moved),
        "plot_movers": analysis.movers(world.trace),
        "plot_changes": moved,
        "plot_phases": analysis.trace_series(world.trace),
        "plot_shift_sparsity": analysis.shift_sparsity(world.trace),
        "plot_selection_overlap": analysis.selection_overlap(world.trace),
        **recorded(tmp_path_factory.mktemp("plots") / "a.zarr"),
        **made_up(),
    }


def recorded(path):
    """Return tables of a short training whose trace has norms, a division, attention weights and inputs."""
    records = [TopK(40), Norms(), Division()]
    recorder = GradTrace(path, records, params=["*self_attn*weight", "*embed*"], weights_every_n_steps=1)
    fit(Model(), recorder, max_epochs=1)
    trace = open_trace(path)
    shifts = analysis.head_shifts(trace, analysis.attention_heads(trace, 2))
    moved = shifts.groupby("sample_id")["size"].sum()
    groups = pd.DataFrame({"third": moved.index % 3, "half": moved.index % 2}, index=moved.index)
    return {
        "plot_coherence": analysis.coherence(trace),
        "plot_division": analysis.division(trace),
        "plot_head_shifts": shifts,
        "plot_self_influence": analysis.self_influence(trace),
        "plot_variance_explained": analysis.variance_explained(moved, groups, n_permutations=9),
    }


def made_up():
    """Return tables of which only the columns matter."""
    alignment = {"first_step": [0, 1, 2], "pearson": [0.1, np.nan, 0.3], "null_mean": 0.0, "null_std": 0.02}
    return {"plot_bigram_alignment": pd.DataFrame(alignment)}


def enrichment(trace):
    moved = trace.topk.frame().assign(size=lambda t: t["shift"].abs())
    return analysis.token_enrichment(moved, trace, by=["param"], min_count=1, n_resamples=9)


def draw(name, table, **options):
    if name == "plot_changes":
        return plots.plot_changes(table, pd.DataFrame({"step": [3]}), value="moved", **options)
    if name == "plot_phases":
        phases = pd.DataFrame({"first_step": [1, 3], "last_step": [1, 4], "series": [2, 5]})
        return plots.plot_phases(table, phases.head(len(table)), **options)
    return FUNCTIONS[name](table, **options)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_plot_draws_its_table(name, tables):
    ax = draw(name, tables[name])
    ax.figure.canvas.draw()
    assert ax.get_title()
    assert ax.lines or ax.collections or ax.patches or ax.images
    assert draw(name, tables[name], ax=ax) is ax
    empty = draw(name, tables[name].head(0))
    empty.figure.canvas.draw()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_missing_column_is_named(name):
    with pytest.raises(ValueError, match="the table lacks the columns"):
        draw(name, pd.DataFrame({"x": [1]}))


def test_values_are_those_of_the_table(tables):
    table = tables["plot_effects"]
    ax = plots.plot_effects(table)
    drawn = ax.lines[1].get_xdata()
    assert sorted(drawn) == pytest.approx(sorted(table["loss_change"]))
    bars = plots.plot_flips(tables["plot_flips"], n=3).patches
    # the flips of a token add up over the neurons that are switched off
    sums = {}
    for row in tables["plot_flips"].itertuples():
        flips, count = sums.get(row.text, (0, 0))
        sums[row.text] = flips + row.flips, count + row.count
    expected = sorted(sums.values(), key=lambda pair: -pair[0])[:3]
    assert sorted(bar.get_width() for bar in bars) == pytest.approx(sorted(f / c for f, c in expected))
    controls = tables["plot_controls"]
    ax = plots.plot_controls(controls, measure="notable_share")
    part = controls[(controls["measure"] == "notable_share") & controls["effect"].notna()]
    assert sorted(ax.lines[1].get_xdata()) == pytest.approx(sorted(part["effect"]))
    lost = tables["plot_token_losses"]
    bars = plots.plot_token_losses(lost, n=2).patches
    assert bars[0].get_width() == pytest.approx(lost["loss_change"].max())


def test_shares_of_heads_and_of_parts_of_a_change_are_those_of_the_table(tables):
    moved = tables["plot_head_shifts"]
    (image,) = plots.plot_head_shifts(moved).images
    sums = moved.groupby(["module", "head", "part"], observed=True)["size"].sum()
    drawn = image.get_array()
    assert drawn.sum() == pytest.approx(1)
    assert sorted(drawn[drawn > 0]) == pytest.approx(sorted(sums / sums.sum()))
    division = tables["plot_division"]
    drawn = {line.get_label(): line.get_ydata()[-1] for line in plots.plot_division(division).lines}
    whole = division.groupby("part")["growth"].sum()
    assert {name: drawn[name] for name in whole.index} == pytest.approx(dict(whole))
    assert drawn["together"] == pytest.approx(whole.sum())


def test_series_are_rows_from_lowest_to_highest_and_boundaries_say_how_many_change():
    steps = np.arange(50)
    rows = {("loss", ""): -steps, ("moved", "a.weight"): steps}
    parts = [pd.DataFrame({"series": k[0], "param": k[1], "step": steps, "value": v}) for k, v in rows.items()]
    ax = draw("plot_phases", pd.concat(parts))
    falling, rising = ax.images[0].get_array()
    assert (np.diff(falling) <= 0).all() and (np.diff(rising) >= 0).all() and rising[-1] == 1
    assert [(text.get_position()[0], text.get_text()) for text in ax.texts] == [(3.5, "5"), (1, "2")]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["loss", "moved a"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_plot_says_of_which_analysis_it_is(name):
    named = re.findall(r"`(\w+)`", inspect.getdoc(FUNCTIONS[name]))
    assert any(callable(getattr(analysis, one, None)) for one in named)


def test_every_plot_takes_axes():
    assert all("ax" in inspect.signature(f).parameters for f in FUNCTIONS.values())


def test_labels_leave_out_what_is_said_twice_and_keep_the_end_of_long_names():
    assert label_of(("a.b.weight", "a.b", "in", 3)) == "a.b.weight in 3"
    assert label_of(("0.attn", 0)) == "0.attn 0"
    long = label_of(("network.encoder.layers.0.self_attn.in_proj_weight", 3))
    assert label_of("a\x1bb") == r"a\x1bb"
    assert long == "….0.self_attn.in_proj_weight 3"


def test_the_map_of_neurons_holds_their_values_and_nothing_elsewhere(tables):
    table = tables["plot_neurons"]
    ax = plots.plot_neurons(table, value="n_samples")
    cells = np.asarray(ax.images[0].get_array().filled(np.nan))
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert np.isfinite(cells).sum() == len(table) and len(labels) == table["param"].nunique()
    one = table[table["param"] == sorted(table["param"])[0]]
    expected = np.full(cells.shape[1], np.nan)
    expected[one["neuron"]] = one["n_samples"]
    np.testing.assert_array_equal(cells[0], expected)
