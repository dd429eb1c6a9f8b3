"""Every plot function draws what its table holds, also an empty one, and names a column that is missing."""

from __future__ import annotations

import inspect

import numpy as np
import pandas as pd
import pytest

from lightning_gradtrace import analysis
from lightning_gradtrace.report import plots
from lightning_gradtrace.report.plots._drawing import label_of
from tests.analysis.models import PlantedLM, planted_world
from tests.analysis.test_weights import snapshots, trace_with
from tests.analysis.traces import write_trace

FUNCTIONS = {name: f for name, f in vars(plots).items() if name.startswith("plot_")}


@pytest.fixture(scope="module")
def tables():
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
        "plot_heads": head_shifts(),
        "plot_phases": boundaries(),
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
    }


def enrichment(trace):
    moved = trace.topk.frame().assign(size=lambda t: t["shift"].abs())
    return analysis.token_enrichment(moved, trace, by=["param"], min_count=1, n_resamples=9)


def head_shifts():
    trace = write_trace({"a.W_Q": (2, 4, 2)}, np.arange(6).reshape(3, 2), np.array([[0, 9, 13]] * 6))
    return analysis.head_shifts(trace)


def boundaries():
    changes = pd.DataFrame({"series": ["loss", "moved", "moved"], "param": ["", "a", "b"], "step": [5, 6, 90]})
    return analysis.phase_boundaries(changes, window=10, span=(0, 100))


def draw(name, table, **options):
    if name == "plot_changes":
        return plots.plot_changes(table, pd.DataFrame({"step": [3]}), value="moved", **options)
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


def test_every_plot_takes_axes():
    assert all("ax" in inspect.signature(f).parameters for f in FUNCTIONS.values())


def test_labels_leave_out_what_is_said_twice_and_keep_the_end_of_long_names():
    assert label_of(("a.b.weight", "a.b", "in", 3)) == "a.b.weight in 3"
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


def test_phases_stand_at_their_steps_with_their_number_of_series(tables):
    ax = plots.plot_phases(tables["plot_phases"])
    assert list(ax.lines[0].get_xdata()) == [5.5] and list(ax.lines[0].get_ydata()) == [2]
    assert list(ax.lines[1].get_ydata()) == [tables["plot_phases"]["expected"].iloc[0]] * 2


def test_movement_of_heads_adds_up_over_occurrences():
    table = head_shifts()
    image = plots.plot_heads(table).images[0].get_array()
    assert image.shape == (table[["module", "head", "part"]].drop_duplicates().shape[0], 3)
    np.testing.assert_allclose(image, 1 / 3)
