"""From a trace to tables: functions of a `Trace` that return tidy DataFrames.

In the order of the method (docs/concepts.md, 5): `frequent_entries`, `notable_tokens`, `neurons`, `neuron_ablation`,
the controls, `layer_table`. None of them needs a Trainer or a GPU; only ablations need the model.
"""

from lightning_gradtrace.analysis.ablation import flip_table as flip_table
from lightning_gradtrace.analysis.ablation import neuron_ablation as neuron_ablation
from lightning_gradtrace.analysis.controls import frequency_control as frequency_control
from lightning_gradtrace.analysis.controls import neuron_control as neuron_control
from lightning_gradtrace.analysis.controls import null_control as null_control
from lightning_gradtrace.analysis.controls import null_tokens as null_tokens
from lightning_gradtrace.analysis.controls import permuted_links as permuted_links
from lightning_gradtrace.analysis.controls import pool_controls as pool_controls
from lightning_gradtrace.analysis.controls import random_control as random_control
from lightning_gradtrace.analysis.enrichment import pattern_enrichment as pattern_enrichment
from lightning_gradtrace.analysis.entries import count_entries as count_entries
from lightning_gradtrace.analysis.entries import frequent_entries as frequent_entries
from lightning_gradtrace.analysis.flips import count_flips as count_flips
from lightning_gradtrace.analysis.head_shifts import head_shifts as head_shifts
from lightning_gradtrace.analysis.heads import attention_heads as attention_heads
from lightning_gradtrace.analysis.interventions import zero_ablation as zero_ablation
from lightning_gradtrace.analysis.layers import layer_table as layer_table
from lightning_gradtrace.analysis.neurons import attributed_samples as attributed_samples
from lightning_gradtrace.analysis.neurons import neuron_samples as neuron_samples
from lightning_gradtrace.analysis.neurons import neurons as neurons
from lightning_gradtrace.analysis.neurons import with_tokens as with_tokens
from lightning_gradtrace.analysis.predictions import Predictor as Predictor
from lightning_gradtrace.analysis.predictions import predict as predict
from lightning_gradtrace.analysis.tokens import notable_tokens as notable_tokens
