"""One figure for each table of `lightning_gradtrace.analysis`: functions of a table that return matplotlib Axes.

Every function takes `ax`, the Axes to draw in; None makes a figure of its own (`ax.figure`), outside pyplot.
"""

from lightning_gradtrace.report.plots.model import plot_ablation as plot_ablation
from lightning_gradtrace.report.plots.model import plot_activations as plot_activations
from lightning_gradtrace.report.plots.model import plot_controls as plot_controls
from lightning_gradtrace.report.plots.model import plot_effects as plot_effects
from lightning_gradtrace.report.plots.model import plot_flips as plot_flips
from lightning_gradtrace.report.plots.model import plot_layers as plot_layers
from lightning_gradtrace.report.plots.model import plot_token_losses as plot_token_losses
from lightning_gradtrace.report.plots.model import plot_top_samples as plot_top_samples
from lightning_gradtrace.report.plots.selection import plot_entries as plot_entries
from lightning_gradtrace.report.plots.selection import plot_neurons as plot_neurons
from lightning_gradtrace.report.plots.selection import plot_outliers as plot_outliers
from lightning_gradtrace.report.plots.selection import plot_tokens as plot_tokens
from lightning_gradtrace.report.plots.time import plot_changes as plot_changes
from lightning_gradtrace.report.plots.time import plot_enrichment as plot_enrichment
from lightning_gradtrace.report.plots.time import plot_formation as plot_formation
from lightning_gradtrace.report.plots.time import plot_heads as plot_heads
from lightning_gradtrace.report.plots.time import plot_movement as plot_movement
from lightning_gradtrace.report.plots.time import plot_movers as plot_movers
from lightning_gradtrace.report.plots.time import plot_phases as plot_phases
from lightning_gradtrace.report.plots.weights import plot_bigrams as plot_bigrams
from lightning_gradtrace.report.plots.weights import plot_directions as plot_directions
from lightning_gradtrace.report.plots.weights import plot_spectra as plot_spectra
from lightning_gradtrace.report.plots.weights import plot_weights as plot_weights
