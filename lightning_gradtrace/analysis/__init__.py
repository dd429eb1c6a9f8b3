"""From a trace to tables: functions of a `Trace` that return tidy DataFrames.

In the order of the method (docs/concepts.md, 5): `frequent_entries`, `notable_tokens`, `neurons`, `neuron_ablation`,
the controls, `layer_table`. None of them needs a Trainer or a GPU; only ablations need the model.
"""

from lightning_gradtrace.analysis.ablate import Ablated as Ablated
from lightning_gradtrace.analysis.ablate import ablate as ablate
from lightning_gradtrace.analysis.ablation import flip_table as flip_table
from lightning_gradtrace.analysis.ablation import neuron_ablation as neuron_ablation
from lightning_gradtrace.analysis.activations import activation_baseline as activation_baseline
from lightning_gradtrace.analysis.activations import top_samples as top_samples
from lightning_gradtrace.analysis.bigrams import bigram_shifts as bigram_shifts
from lightning_gradtrace.analysis.bigrams import largest_pairs as largest_pairs
from lightning_gradtrace.analysis.changes import change_points as change_points
from lightning_gradtrace.analysis.components import attributed_samples as attributed_samples
from lightning_gradtrace.analysis.components import component_switches as component_switches
from lightning_gradtrace.analysis.components import components as components
from lightning_gradtrace.analysis.components import with_tokens as with_tokens
from lightning_gradtrace.analysis.controls import frequency_control as frequency_control
from lightning_gradtrace.analysis.controls import null_control as null_control
from lightning_gradtrace.analysis.controls import null_tokens as null_tokens
from lightning_gradtrace.analysis.controls import peer_control as peer_control
from lightning_gradtrace.analysis.controls import permuted_links as permuted_links
from lightning_gradtrace.analysis.controls import pool_controls as pool_controls
from lightning_gradtrace.analysis.controls import random_control as random_control
from lightning_gradtrace.analysis.directions import direction_shifts as direction_shifts
from lightning_gradtrace.analysis.directions import principal_directions as principal_directions
from lightning_gradtrace.analysis.effects import ablation_effects as ablation_effects
from lightning_gradtrace.analysis.effects import flip_tables as flip_tables
from lightning_gradtrace.analysis.effects import token_losses as token_losses
from lightning_gradtrace.analysis.enrichment import pattern_enrichment as pattern_enrichment
from lightning_gradtrace.analysis.entries import count_entries as count_entries
from lightning_gradtrace.analysis.entries import frequent_entries as frequent_entries
from lightning_gradtrace.analysis.flips import count_flips as count_flips
from lightning_gradtrace.analysis.head_shifts import head_shifts as head_shifts
from lightning_gradtrace.analysis.heads import attention_heads as attention_heads
from lightning_gradtrace.analysis.interventions import zero_ablation as zero_ablation
from lightning_gradtrace.analysis.layers import layer_table as layer_table
from lightning_gradtrace.analysis.memory import eventual_shift as eventual_shift
from lightning_gradtrace.analysis.movement import formation as formation
from lightning_gradtrace.analysis.movement import movement as movement
from lightning_gradtrace.analysis.movement import movers as movers
from lightning_gradtrace.analysis.neurons import neuron_samples as neuron_samples
from lightning_gradtrace.analysis.neurons import neurons as neurons
from lightning_gradtrace.analysis.normalise import relative_shifts as relative_shifts
from lightning_gradtrace.analysis.outliers import outliers as outliers
from lightning_gradtrace.analysis.predictions import Predictor as Predictor
from lightning_gradtrace.analysis.predictions import predict as predict
from lightning_gradtrace.analysis.switches import Switch as Switch
from lightning_gradtrace.analysis.tokens import notable_tokens as notable_tokens
from lightning_gradtrace.analysis.weights import neuron_weights as neuron_weights
from lightning_gradtrace.analysis.weights import weight_spectra as weight_spectra
from lightning_gradtrace.analysis.weights import weight_statistics as weight_statistics
