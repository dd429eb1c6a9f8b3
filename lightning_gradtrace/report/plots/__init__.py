"""One figure for each table of `lightning_gradtrace.analysis`: functions of a table that return matplotlib Axes.

Every function takes `ax`, the Axes to draw in; None makes a figure of its own (`ax.figure`), outside pyplot.
"""

from lightning_gradtrace.report.plots.ablation import plot_ablation as plot_ablation
from lightning_gradtrace.report.plots.ablation import plot_activations as plot_activations
from lightning_gradtrace.report.plots.ablation import plot_controls as plot_controls
from lightning_gradtrace.report.plots.ablation import plot_effects as plot_effects
from lightning_gradtrace.report.plots.ablation import plot_flips as plot_flips
from lightning_gradtrace.report.plots.ablation import plot_layers as plot_layers
from lightning_gradtrace.report.plots.ablation import plot_token_losses as plot_token_losses
from lightning_gradtrace.report.plots.ablation import plot_top_samples as plot_top_samples
from lightning_gradtrace.report.plots.mechanisms import plot_coherence as plot_coherence
from lightning_gradtrace.report.plots.mechanisms import plot_division as plot_division
from lightning_gradtrace.report.plots.mechanisms import plot_enrichment as plot_enrichment
from lightning_gradtrace.report.plots.mechanisms import plot_head_shifts as plot_head_shifts
from lightning_gradtrace.report.plots.mechanisms import plot_variance_explained as plot_variance_explained
from lightning_gradtrace.report.plots.movement import plot_changes as plot_changes
from lightning_gradtrace.report.plots.movement import plot_directions as plot_directions
from lightning_gradtrace.report.plots.movement import plot_formation as plot_formation
from lightning_gradtrace.report.plots.movement import plot_movement as plot_movement
from lightning_gradtrace.report.plots.movement import plot_movers as plot_movers
from lightning_gradtrace.report.plots.phases import plot_bigram_alignment as plot_bigram_alignment
from lightning_gradtrace.report.plots.phases import plot_phases as plot_phases
from lightning_gradtrace.report.plots.phases import plot_selection_overlap as plot_selection_overlap
from lightning_gradtrace.report.plots.phases import plot_self_influence as plot_self_influence
from lightning_gradtrace.report.plots.phases import plot_shift_sparsity as plot_shift_sparsity
from lightning_gradtrace.report.plots.selection import plot_bigrams as plot_bigrams
from lightning_gradtrace.report.plots.selection import plot_entries as plot_entries
from lightning_gradtrace.report.plots.selection import plot_neurons as plot_neurons
from lightning_gradtrace.report.plots.selection import plot_outliers as plot_outliers
from lightning_gradtrace.report.plots.selection import plot_tokens as plot_tokens
from lightning_gradtrace.report.plots.weights import plot_spectra as plot_spectra
from lightning_gradtrace.report.plots.weights import plot_weights as plot_weights
